"""Which backend runs a call, and why: a registry of ops, a resolution order, and reasons in words.

Resolution: the `backend=` argument, then `use_backend(...)`, then MMKERNELS_BACKEND, then the automatic order of the
tensor's device.  A named backend runs or raises.  The automatic order takes the first backend that has no objection;
`explain()` tells what would run and why the others would not.  Everything here is traceable by torch.compile.

Decoding calls an op for every token and layer, and resolving takes longer than the op: `Op.direct` is the short way for
calls that nothing but their arguments decides (docs/adr/0004).
"""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from mmkernels import _env
from mmkernels.errors import BackendError, nearest

BACKENDS = ("native", "triton", "torch", "reference", "upstream")
AUTOMATIC = {"cpu": ("native", "torch"), "cuda": ("triton", "native", "torch")}
NATIVE_PROBE = "mmkernels._native:probe"
_FORCED = _env.forced_backend()
_OPS: "dict[str, Op]" = {}
# By a name of this module, each is one look-up a call instead of three.
_Tensor = torch.Tensor
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active


class _Override(threading.local):
    # A threading.local, not a ContextVar: torch.compile(fullgraph=True) cannot trace ContextVar.get.
    default: str | None = None
    per_op: Mapping[str, str] = {}
    explaining: bool = False
    idle: bool = True  # none of the above says anything: one look-up instead of three

    def settle(self) -> None:
        """To be called after every change of the others."""
        self.idle = not (self.default or self.per_op or self.explaining)


_override = _Override()


class BackendUnavailable(Exception):  # noqa: N818  (a state of the machine, not a mistake)
    """Raised when a backend's module is imported: the reason, in words, why this machine cannot run it."""


class _Explained(Exception):  # noqa: N818  (carries an answer out of a call)
    def __init__(self, report: "Explanation"):
        self.report = report


class Explanation:
    """What a call would run on, and each other backend's objections.  Prints as a small table."""

    def __init__(self, op: str, chosen: str | None, objections: dict[str, list[str]], call: str):
        self.op, self.chosen, self.objections, self.call = op, chosen, objections, call

    def __repr__(self) -> str:
        rows = [f"{self.op}({self.call})", f"  runs on: {self.chosen or 'nothing'}"]
        rows += [f"  {name:<10} {'; '.join(why) or 'could run'}" for name, why in self.objections.items()]
        return "\n".join(rows)


class BackendTable(dict[str, dict[str, str]]):
    """Op -> backend -> "ready", or the reason why not.  Prints as a table."""

    def __repr__(self) -> str:
        width = max((len(op) for op in self), default=4) + 2
        return "\n".join(
            f"{op if first else '':<{width}}{name:<11}{status}"
            for op, row in self.items()
            for first, (name, status) in ((i == 0, item) for i, item in enumerate(row.items()))
        )


class Backend:
    """One way to run one op, imported on first use.

    Args:
        name: one of BACKENDS.
        source: "package.module:function", the implementation; it takes the op's validated keyword arguments.  The
            import may raise BackendUnavailable.
        devices: device types it serves.
        declines: gets the same arguments and returns its objections in words, none if it can run them.
        probe: "package.module:function" that says, without compiling anything, why the import would fail, or None.
        direct: "package.module:name" of a library op that may be called without the public function's checks, see
            `Op.direct`.
    """

    def __init__(
        self,
        name: str,
        source: str,
        devices: tuple[str, ...] = ("any",),
        declines: Callable[..., list[str]] | None = None,
        probe: str | None = None,
        direct: str | None = None,
    ):
        self.name, self.source, self.devices, self.declines, self.probe = name, source, devices, declines, probe
        self.direct = direct
        self.impl: Callable[..., Any] | None = None
        self.library_op: Callable[..., Any] | None = None
        self.reason: str | None = None

    def unavailable(self) -> str | None:
        """Load the backend once; None when it is ready, else the remembered reason."""
        if self.impl is None and self.reason is None:
            try:
                self.impl = _imported(self.source)
                if self.direct is not None:
                    self.library_op = _imported(self.direct)
            except BackendUnavailable as error:
                self.reason = str(error)
        return self.reason

    def status(self) -> str:
        """Say "ready" or a reason, without compiling anything."""
        if self.impl is None and self.reason is None and self.probe is not None:
            return _imported(self.probe)() or "ready"
        return self.unavailable() or "ready"


def _unavailable(op: str, backend: str) -> str | None:
    # Constant under torch.compile: importing modules and loading libraries happens while tracing, never in the graph.
    return _OPS[op].entries[backend].unavailable()


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler, a second at every start.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _imported(source: str) -> Callable[..., Any]:
    module, name = source.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


class Op:
    """A named piece of mathematics with interchangeable backends.

    Args:
        name: the public function's name.
        key: the argument whose device selects the automatic order.
        public: dotted path of the public function, for `explain` and the documentation.
        backends: the entries, in any order; `reference` and `torch` are mandatory (the contract test insists).
    """

    def __init__(self, name: str, key: str, public: str, backends: list[Backend]):
        self.name, self.key, self.public = name, key, public
        self.entries = {entry.name: entry for entry in backends}
        self._native = self.entries.get("native")
        unknown = [n for n in self.entries if n not in BACKENDS]
        if unknown:
            raise ValueError(f"{name}: unknown backend {unknown[0]!r}. {nearest(unknown[0], BACKENDS)}")
        _OPS[name] = self

    def __call__(self, backend: str | None, args: dict[str, Any]) -> Any:
        """Run the call on the resolved backend.  `args` are the validated keyword arguments of the implementation."""
        if _override.explaining:
            raise _Explained(self._explanation(backend, args))
        implementation, device = self.resolve(backend, args), args[self.key].device.type
        if device in AUTOMATIC and torch.is_autocast_enabled(device):
            # The dtypes of the arguments say where to round; autocast must not narrow products inside an op as well.
            with torch.autocast(device, enabled=False):
                return implementation(**args)
        return implementation(**args)

    def direct(self, backend: str | None, x: Any) -> Callable[..., Any] | None:
        """The native library op, if nothing but its arguments can object to it; else None: then take the ordinary way.

        `x` is a plain tensor on the CPU; nothing is forced, traced, transformed, watched by a dispatch mode or
        differentiated.  What is left to the op: everything that the public function checks.  It refuses with a
        RuntimeError before it has changed anything, whereupon the ordinary way finds the words, or another way to
        compute what the op does not.
        """
        if is_dynamo_compiling() or type(x) is not _Tensor or not x.is_cpu or _grad_enabled():
            return None
        if not _override.idle or _FORCED is not None or (backend is not None and backend != "native"):
            return None
        if _dispatch_modes() or _transforms_active() or forward_ad._current_level >= 0:
            return None
        return self._native.library_op if self._native is not None else None

    def resolve(self, backend: str | None, args: dict[str, Any]) -> Callable[..., Any]:
        """The implementation that runs this call, or a BackendError with every reason."""
        device = args[self.key].device.type
        name = self._forced(backend)
        if name is not None:
            reasons = self._objections(name, device, args)
            if not reasons:
                return self.entries[name].impl  # type: ignore[return-value]
            raise BackendError(
                f"{self.name}: backend {name!r} was asked for and cannot run this call ({describe(args)}): "
                f"{'; '.join(reasons)}. Leave backend out to let an able one be chosen."
            )
        for name in AUTOMATIC.get(device, ("torch",)):
            if name in self.entries and not self._objections(name, device, args):
                return self.entries[name].impl  # type: ignore[return-value]
        raise BackendError(f"no backend can run this call.\n{self._explanation(None, args)}")

    def _forced(self, backend: str | None) -> str | None:
        name = backend or _override.per_op.get(self.name) or _override.default or _FORCED
        if name is None or name == "auto":
            return None
        if name not in BACKENDS:
            raise BackendError(f"{self.name}: backend must name a backend; got {name!r}. {nearest(name, BACKENDS)}")
        return name

    def _objections(self, name: str, device: str, args: dict[str, Any]) -> list[str]:
        if name not in self.entries:
            return [f"{self.name} has no {name} backend (it has: {', '.join(self.entries)})"]
        entry = self.entries[name]
        if "any" not in entry.devices and device not in entry.devices:
            return [f"it runs on {' and '.join(entry.devices)}; the tensors are on {device}"]
        reason = _unavailable(self.name, name)
        if reason is not None:
            return [reason]
        return entry.declines(**args) if entry.declines is not None else []

    def _explanation(self, backend: str | None, args: dict[str, Any]) -> Explanation:
        device = args[self.key].device.type
        objections = {name: self._objections(name, device, args) for name in self.entries}
        forced = self._forced(backend)
        order = (forced,) if forced else AUTOMATIC.get(device, ("torch",))
        chosen = next((n for n in order if n in objections and not objections[n]), None)
        return Explanation(self.name, chosen, objections, describe(args))


def describe(args: Mapping[str, Any]) -> str:
    """The call in words: shapes and dtypes of tensors, values of the rest; None is left out."""
    parts = []
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            kind = str(value.dtype).removeprefix("torch.")
            parts.append(f"{name}: {tuple(value.shape)} {kind} {value.device.type}")
        elif value is not None:
            parts.append(f"{name}={value!r}")
    return ", ".join(parts)


@contextmanager
def use_backend(default: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Force a backend inside a `with` block, in this thread: for every op, or op by op.

    Example:
        >>> with use_backend("reference", causal_conv1d="torch"):
        ...     pass
    """
    _load_all()
    for op in per_op:
        if op not in _OPS:
            raise BackendError(f"use_backend: no op is called {op!r}. {nearest(op, _OPS)}")
    for name in (default, *per_op.values()):
        if name is not None and name != "auto" and name not in BACKENDS:
            raise BackendError(f"use_backend: backend must name a backend; got {name!r}. {nearest(name, BACKENDS)}")
    before = (_override.default, _override.per_op)
    _override.default, _override.per_op = default or before[0], {**before[1], **per_op}
    _override.settle()
    try:
        yield
    finally:
        _override.default, _override.per_op = before
        _override.settle()


def backends() -> BackendTable:
    """Op by op, which backends are ready on this machine and why the others are not (nothing is compiled)."""
    _load_all()
    return BackendTable({op.name: {e.name: e.status() for e in op.entries.values()} for op in _OPS.values()})


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """What `op(*args, **kwargs)` would run on, and why not the rest.  Nothing is computed.

    Args:
        op: name of a public op, e.g. "ssd_scan".
        *args, **kwargs: exactly what the op itself would get; bad arguments raise the op's own error.
    """
    _load_all()
    if op not in _OPS:
        raise BackendError(f"explain: no op is called {op!r}. {nearest(op, _OPS)}")
    module, name = _OPS[op].public.rsplit(".", 1)
    _override.explaining = True
    _override.settle()
    try:
        getattr(importlib.import_module(module), name)(*args, **kwargs)
    except _Explained as answer:
        return answer.report
    finally:
        _override.explaining = False
        _override.settle()
    raise AssertionError(f"{op} returned without dispatching")


def registered() -> dict[str, Op]:
    """Every op by name, all op modules imported."""
    _load_all()
    return dict(_OPS)


def _load_all() -> None:
    import mmkernels.ops  # noqa: F401  (registers every op)
