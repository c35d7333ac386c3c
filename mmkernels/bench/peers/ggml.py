"""llama.cpp's CPU kernels, `ggml_ssm_scan` and `ggml_ssm_conv`, through the libggml that llama-cpp-python ships.

The timed call is one ggml_graph_compute over the op alone: bias of the step size and skip are left out in its favour.
Signatures: ggml.h of ggml 0.9 and later, as shipped with llama-cpp-python 0.3.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.problems import Prepared, Problem, Unavailable, require_one_row

_F32, _I32 = 0, 26  # enum ggml_type
_SPARE = 64 << 20  # bytes of a context beyond its tensors: graph, work buffer, tensor headers


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Library:
    """The functions used here, with their types."""

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL):
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64

        def typed(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function

        self.init = typed(base, "ggml_init", pointer, _InitParams)
        self.free = typed(base, "ggml_free", None, pointer)
        self.tensor = typed(base, "ggml_new_tensor_4d", pointer, pointer, ctypes.c_int, int64, int64, int64, int64)
        self.data = typed(base, "ggml_get_data", pointer, pointer)
        self.scan = typed(base, "ggml_ssm_scan", pointer, *[pointer] * 8, int64)
        self.conv = typed(base, "ggml_ssm_conv", pointer, *[pointer] * 3)
        self.silu = typed(base, "ggml_silu", pointer, pointer, pointer)
        self.add = typed(base, "ggml_add", pointer, pointer, pointer, pointer)
        self.graph = typed(base, "ggml_new_graph", pointer, pointer)
        self.expand = typed(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.compute = typed(cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int)


@functools.cache
def _library() -> _Library:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise Unavailable(
            "llama-cpp-python is not installed; pip install --no-binary llama-cpp-python llama-cpp-python (minutes)"
        )
    folder = Path(found.origin).parent / "lib"
    try:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        return _Library(base, ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL))
    except (OSError, AttributeError) as error:
        raise Unavailable(f"libggml of {folder.parent} cannot be used: {error}") from error


class _Graph:
    """A ggml context with its tensors and one graph."""

    def __init__(self, floats: int):
        self.library = _library()
        self.context = self.library.init(_InitParams(4 * floats + _SPARE, None, False))
        if not self.context:
            raise Unavailable(f"ggml got no {4 * floats + _SPARE} bytes of memory")
        self.graph = self.library.graph(self.context)

    def put(self, value: Tensor, *sizes: int) -> int:
        """A tensor of these sizes, innermost first, with the values of a torch tensor."""
        value = value.detach().contiguous()
        sizes = sizes + (1,) * (4 - len(sizes))
        made = self.library.tensor(self.context, _I32 if value.dtype == torch.int32 else _F32, *sizes)
        ctypes.memmove(self.library.data(made), value.data_ptr(), value.numel() * 4)
        return made

    def run(self, threads: int) -> None:
        """Compute the graph."""
        if self.library.compute(self.context, self.graph, threads):
            raise Unavailable("ggml_graph_compute_with_ctx failed")

    def read(self, tensor: int, count: int) -> Tensor:
        """A copy of the first `count` floats of a tensor."""
        floats = (ctypes.c_float * count).from_address(self.library.data(tensor))
        return torch.frombuffer(floats, dtype=torch.float32).clone()

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.library.free(self.context)
            self.context = None


def _scan_node(graph: _Graph, a: dict[str, Tensor], state: Tensor, length: int) -> int:
    """One ggml_ssm_scan over `length` tokens from `state`; its result holds y, then the new state."""
    heads, width = a["x"].shape[-2:]
    groups, dstate = a["B"].shape[-2:]
    bias = a["dt"].float() + a["dt_bias"]  # the op has softplus, not the bias
    return graph.library.scan(
        graph.context,
        graph.put(state, dstate, width, heads, 1),
        graph.put(a["x"].float(), width, heads, length, 1),
        graph.put(bias, heads, length, 1),
        graph.put(a["A"], 1, heads),
        graph.put(a["B"].float(), dstate, groups, length, 1),
        graph.put(a["C"].float(), dstate, groups, length, 1),
        graph.put(torch.zeros(1, dtype=torch.int32), 1),
        1,  # snapshots of the state to keep; an argument too many for versions that have none
    )


def scan(problem: Problem) -> Prepared:
    """`ggml_ssm_scan`."""
    require_one_row(problem)
    a, s, threads = problem.args, problem.cell.sizes, problem.cell.threads
    count, length = a["x"].numel(), problem.cell.seqlen
    state = torch.zeros(s.nheads, s.headdim, s.dstate)
    graph = _Graph(4 * (count + state.numel() + a["dt"].numel() + a["B"].numel()))
    node = _scan_node(graph, a, state, length)
    graph.library.expand(graph.graph, node)

    def result(_: None) -> Tensor:
        return graph.read(node, count).view(a["x"].shape) + a["D"][:, None] * a["x"].float()

    return Prepared(lambda: graph.run(threads), result)


def update(problem: Problem) -> Prepared:
    """`ggml_ssm_scan` over one token, all layers in one graph; the copy of the state into its cache is left out."""
    require_one_row(problem)
    a, threads = problem.args, problem.cell.threads
    states = a["states"]
    count = a["x"].numel()
    graph = _Graph(4 * len(states) * (states[0].numel() + 2 * count))
    nodes = [_scan_node(graph, a, state, 1) for state in states]
    for node in nodes:
        graph.library.expand(graph.graph, node)

    def result(_: None) -> Tensor:
        out = graph.read(nodes[-1], count + states[-1].numel()).double()
        y = out[:count] + (a["D"][:, None] * a["x"]).double().flatten()
        return torch.cat([y, out[count:]])

    return Prepared(lambda: graph.run(threads), result, len(states))


def conv(problem: Problem) -> Prepared:
    """`ggml_ssm_conv` with bias and silu after it, over data that is channels first as it wants it."""
    require_one_row(problem)
    a, s, threads = problem.args, problem.cell.sizes, problem.cell.threads
    length, dim, width = problem.cell.seqlen, s.conv_dim, s.conv_width
    graph = _Graph(6 * (length + width) * dim)
    padded = F.pad(a["x"][0].float().t(), (width - 1, 0))
    node = graph.library.conv(
        graph.context, graph.put(padded, length + width - 1, dim, 1), graph.put(a["weight"].float(), width, dim)
    )
    node = graph.library.add(graph.context, node, graph.put(a["bias"].float(), dim))
    node = graph.library.silu(graph.context, node)
    graph.library.expand(graph.graph, node)
    return Prepared(lambda: graph.run(threads), lambda _: graph.read(node, length * dim).view(1, length, dim))
