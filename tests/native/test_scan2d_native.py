"""Scans of a grid in C++: ISA levels, dtypes, the fused op, threads, memory, unsafe orders; opcheck."""

import subprocess
import sys

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within, poisoned_allocations
from mmkernels.testing.cases_scan2d import CROSS, conv_ssd_2d_inputs, norm_inputs, ssd_2d_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ops = torch.ops.mmkernels


@pytest.fixture(params=_native.ISA_LEVELS)
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def to(args, dtype, grad=False):
    out = {}
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to(dtype).requires_grad_(grad)
        out[name] = value
    return out


def gradients(op, args, backend):
    leaves = [v for v in args.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    out = op(**args, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_op_without_gradients(isa, dtype):
    """Under no_grad x is convolved inside the scan: sizes around vectors, chunks, register tiles, 1 to 5 taps."""
    for grid, heads, headdim, groups, dstate, taps in (
        ((9, 15), 4, 20, 2, 8, 4),
        ((5, 13), 3, 64, 1, 17, 4),
        ((1, 3), 2, 5, 1, 4, 5),
        ((8, 8), 1, 33, 1, 16, 1),
    ):
        args = conv_ssd_2d_inputs(generator(), 2, grid, heads, headdim, groups, dstate, (*CROSS, "hilbert"), taps=taps)
        rounded = to(args, dtype)
        truth = mmkernels.conv_ssd_scan_2d(**to(rounded, torch.float64), backend="reference")
        peer = mmkernels.conv_ssd_scan_2d(**rounded, backend="torch")
        with torch.no_grad(), poisoned_allocations():
            got = mmkernels.conv_ssd_scan_2d(**rounded, backend="native")
        # In float64 the truth itself is as wrong as the result.
        assert_within(f"{grid} {headdim}", got, truth, peer, dtype=dtype, terms=32 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_at_every_level(isa, dtype):
    cases = [
        (mmkernels.ssd_scan_2d, ssd_2d_inputs(generator(), 1, (7, 11), 3, 20, 1, 17, CROSS, own="B")),
        (mmkernels.merged_gated_rms_norm, norm_inputs(generator(), 2, 3, 5, 42, group_size=21)),
    ]
    for op, made in cases:
        args = to(made, dtype, grad=True)
        truth, peer = gradients(op, to(args, torch.float64, grad=True), "reference"), gradients(op, args, "torch")
        got = gradients(op, args, "native")
        for i, (value, true, other) in enumerate(zip(got, truth, peer, strict=True)):
            # 77 tokens are summed in another order; in float64 the truth itself is as wrong as the result
            terms = 32 if dtype == torch.float64 else 4
            assert_within(f"{op.__name__} {i}", value, true, other, dtype=dtype, terms=terms, summands=77)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    scan = to(ssd_2d_inputs(generator(), 2, (16, 17), 8, 64, 1, 32, CROSS), dtype, grad=True)
    merge = to(norm_inputs(generator(), 2, 4, 272, 512), dtype, grad=True)
    fused = to(conv_ssd_2d_inputs(generator(), 2, (16, 17), 8, 64, 1, 32, CROSS), dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = gradients(mmkernels.ssd_scan_2d, scan, "native")
            made += gradients(mmkernels.merged_gated_rms_norm, merge, "native")
            with torch.no_grad():
                made.append(mmkernels.conv_ssd_scan_2d(**fused, backend="native"))
            results.append(made)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_inference_makes_no_copies():
    """Peak memory of four directions beyond their outputs: less than one copy of x."""
    script = (
        "import resource, torch, mmkernels; torch.set_num_threads(1)\n"
        "K, L, H = 4, 56 * 56, 32; where = dict(height=56, width=56, headdim=64)\n"
        "where['scans'] = ('raster', 'column', 'raster_rev', 'column_rev')\n"
        "xBC, dt = torch.randn(1, L, H * 64 + 32), torch.rand(1, L, H)\n"
        "call = lambda n, **w: mmkernels.conv_ssd_scan_2d(xBC[:, :n], dt[:, :n], torch.ones(K, H * 64 + 32, 4),\n"
        "                                                 -torch.ones(K, H), **w)\n"
        "call(56, **{**where, 'height': 1})\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); y = call(L, **where)\n"
        "print(peak() - before - y.numel() * 4 / 2**20, xBC.numel() * 4 / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra, copy = map(float, done.stdout.split())
    assert extra < copy / 2, f"{extra} MiB beyond the outputs; x, B and C are {copy} MiB"


def raw(args):
    """Arguments of torch.ops.mmkernels.ssd_scan_2d."""
    order = torch.stack([mmkernels.scan_permutation(s, args["height"], args["width"])[0] for s in args["scans"]])
    tensors = [args[name].float() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    return [*tensors, order, True, 0.0, float("inf"), 0]


def test_orders_are_checked_before_anything_is_written():
    args = raw(ssd_2d_inputs(generator(), 1, (2, 3), 2, 4, 1, 4, CROSS, own="x dt B C"))
    for wrong in (args[7] + 1, args[7] - 1, torch.zeros_like(args[7]), args[7][:, :3]):
        with pytest.raises(RuntimeError, match=r"orders|permutations"):
            ops.ssd_scan_2d(*args[:7], wrong, *args[8:])


def test_opcheck():
    # test_contract.py compiles and differentiates every case; here the schemas, fakes and registrations.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    scan = raw(ssd_2d_inputs(generator(), 1, (2, 3), 2, 4, 1, 4, CROSS, own="x dt B C"))
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in scan[:8]]
    torch.library.opcheck(ops.ssd_scan_2d_fwd.default, (*leaves, *scan[8:]), test_utils=checks)
    grads = (torch.randn(scan[0].shape), *leaves, *scan[8:])
    torch.library.opcheck(ops.ssd_scan_2d_bwd.default, grads, test_utils=checks)
    norm = to(norm_inputs(generator(), 1, 2, 3, 4), torch.float32, grad=True)
    options = (1e-5, 4, True)
    args = (norm["y"], norm["weight"], norm["z"], *options)
    torch.library.opcheck(ops.merged_gated_rms_norm_fwd.default, args, test_utils=checks)
    grads = (torch.randn(1, 3, 4), norm["y"], norm["weight"], norm["z"], torch.rand(1, 2, 3, 1), *options)
    torch.library.opcheck(ops.merged_gated_rms_norm_bwd.default, grads, test_utils=checks)
