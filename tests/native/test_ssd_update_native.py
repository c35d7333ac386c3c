"""The C++ recurrent step: every ISA level, dtype of x and of the state, odd sizes, slots, strides, poison, opcheck."""

import pytest
import torch

import mmkernels
from mmkernels import _native
from mmkernels.testing import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN = float("nan")
ops = torch.ops.mmkernels


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    if request.param not in _native.isa_levels():
        pytest.skip(f"this CPU has no {request.param}")
    with _native.use_isa(request.param):
        yield request.param


def inputs(
    dtype, heads, headdim, dstate, groups=1, *, batch=3, tokens=None, skip="head", slots=None, state=None, plain=False
):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lead = (batch,) if tokens is None else (batch, tokens)
    made = {
        "state": normal(batch if slots is None else 6, heads, headdim, dstate).to(state or dtype),
        "x": normal(*lead, heads, headdim),
        "dt": normal(*lead, heads).abs() if plain else normal(*lead, heads),
        "A": -normal(heads).exp(),
        "B": normal(*lead, groups, dstate) / dstate**0.25,
        "C": normal(*lead, groups, dstate) / dstate**0.25,
    }
    if not plain:
        made["D"] = normal(heads, headdim) if skip == "channel" else normal(heads)
        made.update(z=normal(*lead, heads, headdim), dt_bias=normal(heads))
    made = {k: v.to(dtype) if k != "state" else v for k, v in made.items()}
    made["state_indices"] = None if slots is None else torch.tensor(slots)
    return made if plain else {**made, "dt_softplus": True, "dt_limit": (0.01, 2.0)}


def run(args, backend, dtype=None):
    args = {
        k: v.to(dtype or v.dtype, copy=True) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }
    return {"y": mmkernels.ssd_update(**args, backend=backend), "state": args["state"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((3, 5, 7), {"plain": True}),
        ((4, 6, 33, 2), {"skip": "channel"}),
        ((6, 17, 19, 3), {"tokens": 4}),
        ((2, 1, 1), {"slots": [4, -1, 0]}),
        ((4, 9, 16, 4), {"slots": [-5, 3, 5], "tokens": 2}),
        ((24, 64, 128), {"batch": 2}),
    ],
)
def test_error_bar(isa, dtype, sizes, options):
    args = inputs(dtype, *sizes, **options)
    truth, peer, got = run(args, "reference", torch.float64), run(args, "torch"), run(args, "native")
    for name, value in got.items():
        assert value.dtype == dtype
        terms = 16 if dtype == torch.float64 else 1
        assert_within(name, value, truth[name], peer[name], dtype=dtype, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [None, 3])
def test_a_state_of_another_dtype(dtype, state, tokens):
    args = inputs(dtype, 4, 9, 19, 2, state=state, tokens=tokens, slots=[5, -1, 2])
    truth, peer, got = run(args, "reference", torch.float64), run(args, "torch"), run(args, "native")
    assert got["state"].dtype == state
    assert got["y"].dtype == dtype
    # Float64 and float32 mixed: the peer works in float32, as does one of the two here.
    for name, value in got.items():
        band = max(value.dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
        assert_within(name, value, truth[name], peer[name], dtype=band, terms=2)
    untouched = [0, 1, 3, 4]
    assert torch.equal(got["state"][untouched], args["state"][untouched])


def test_steps_round_a_16_bit_state_once_a_call():
    args = inputs(torch.float32, 4, 9, 19, state=torch.bfloat16, tokens=20)
    exact = run({**args, "state": args["state"].float()}, "native")
    got = run(args, "native")
    torch.testing.assert_close(got["y"], exact["y"], rtol=1e-5, atol=1e-5)
    assert torch.equal(got["state"], exact["state"].bfloat16())


def test_bits_do_not_depend_on_the_number_of_threads(isa):
    args = inputs(torch.float32, 24, 64, 128, batch=2)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(args, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other["y"], results[0]["y"])
        assert torch.equal(other["state"], results[0]["state"])


@pytest.mark.parametrize("tokens", [None, 2])
def test_everything_is_read_through_its_strides(isa, tokens):
    args = inputs(torch.float32, 4, 9, 19, 2, tokens=tokens, skip="channel")
    args["A"], args["dt_bias"] = args["A"][:1].expand(4), args["dt_bias"][:1].expand(4)
    args["D"] = args["D"][:, :1].expand(4, 9)
    args["dt"] = args["dt"][..., :1].expand(args["dt"].shape)
    want = run({k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in args.items()}, "native")
    view = dict(args)
    for name in ("x", "z", "B", "C"):  # the last dimension outermost in memory
        tensor = args[name]
        order = (tensor.dim() - 1, *range(tensor.dim() - 1))
        view[name] = tensor.permute(order).contiguous().permute(*range(1, tensor.dim()), 0)
        assert not view[name].is_contiguous()
    inside = torch.full((3, 8, 12, 40), NAN)
    inside[:, ::2, 1:10, 3:22] = args["state"]
    caches = {
        "part of a larger cache": inside[:, ::2, 1:10, 3:22],
        "transposed": args["state"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, state in caches.items():
        y = mmkernels.ssd_update(**{**view, "state": state}, backend="native")
        assert torch.equal(y, want["y"]), name
        assert torch.equal(state, want["state"]), name
    assert inside[:, 1::2].isnan().all()
    assert inside[:, :, 0].isnan().all()
    assert inside[..., 22:].isnan().all()


def test_padding_rows_touch_nothing(isa):
    args = inputs(torch.float32, 4, 9, 19, slots=[3, -1, 1])
    want = run(args, "native")
    bad = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    for name in ("x", "dt", "B", "C", "z"):
        bad[name][1] = NAN
    bad["state"][[0, 2, 4, 5]] = NAN
    got = run(bad, "native")
    assert torch.equal(got["y"], want["y"])
    assert (got["y"][1] == 0).all()
    assert torch.equal(got["state"][[1, 3]], want["state"][[1, 3]])


def test_slots_are_checked_and_gradients_declined():
    with pytest.raises(RuntimeError, match="state_indices must be below 6"):
        run(inputs(torch.float32, 2, 3, 4, slots=[0, 6, 1]), "native")
    args = inputs(torch.float32, 2, 3, 4)
    args["A"].requires_grad_()
    with pytest.raises(mmkernels.BackendError, match="A requires a gradient"):
        mmkernels.ssd_update(**args, backend="native")
    assert mmkernels.ssd_update(**args).requires_grad


def test_opcheck():
    for options in ({"slots": [1, -1, 0]}, {"tokens": 2, "plain": True}):
        made = inputs(torch.float32, 2, 3, 4, **options)
        tensors = [made.get(name) for name in ("state", "x", "dt", "A", "B", "C", "D", "dt_bias")]
        rest = (made.get("dt_softplus", False), made.get("z"), made.get("state_indices"), 0.0, float("inf"))
        args = (*tensors, *rest)
        torch.library.opcheck(ops.ssd_update.default, args)
