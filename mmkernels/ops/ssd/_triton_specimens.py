"""Which ways of compiling the kernels of the state-space scan are held to budgets ahead of time."""

from typing import Any

import torch

from mmkernels._triton import Specimen
from mmkernels.ops.ssd._triton_call import sizes

# (label, dtype, heads, groups, headdim, dstate): Mamba-2 130m (24 heads) and 2.7b (80) share a head, mmMamba has keys
# of its own for every head, Nemotron-H has 8 groups; "scans" reads a grid in several directions (ops/scan2d).
_SHAPES = (
    ("Mamba-2 bf16", torch.bfloat16, 80, 1, 64, 128),
    ("mmMamba bf16", torch.bfloat16, 16, 16, 128, 128),
    ("odd fp16", torch.float16, 6, 3, 48, 80),
    ("Mamba-2 fp32", torch.float32, 24, 1, 64, 128),
    ("dstate 256 bf16", torch.bfloat16, 32, 1, 64, 256),
    ("scans bf16", torch.bfloat16, 80, 1, 64, 128),
)

_STORED = ("x", "z", "B", "C", "dy", "y", "of_gate", "u", "v", "states", "grad_states", "grad_x", "dt", "grad_dt")
_ACCUMULATED = ("A", "D", "dt_bias", "edge_in", "edge_out", "grad_B", "grad_C", "grad_D", "clocks", "shares", "across")
_ALIGNED = (
    "headdim",
    "dstate",
    *(f"{name}_{axis}" for name in ("u", "v", "x", "dy", "z") for axis in ("batch", "direction", "token", "head")),
    *(f"{name}_{axis}" for name in ("B", "C", "v") for axis in ("batch", "direction", "token", "group")),
)


def of(architecture: str, *kernels: Any) -> list[Specimen]:
    """What is compiled ahead of time; every option of the op is in one of them."""
    import triton.language as tl

    found = []
    for label, dtype, heads, groups, headdim, dstate in _SHAPES:
        packed, ids, scans = label.startswith("mmMamba"), label.startswith("odd"), label.startswith("scans")
        gate = not packed and not scans
        pointer = "*" + {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        types: dict[str, str] = dict.fromkeys(_STORED, pointer)
        types |= dict.fromkeys((*_ACCUMULATED, "across_out"), "*fp32") | dict.fromkeys(("grad_A", "grad_bias"), "*fp64")
        types |= dict.fromkeys(("ids", "cu_seqlens", "span_row", "first_span"), "*i32") | {"order": "*i64"}
        given: dict[str, Any] = {"SOFTPLUS": True, "LOW": 0.0, "HIGH": float("inf"), "REVERSE": ids, "ACC": tl.float32}
        given |= {} if packed else {"cu_seqlens": None, "span_row": None, "first_span": None}
        given |= {} if ids else {"ids": None}
        given |= {} if scans else {"order": None}
        given |= {} if gate else {"z": None}
        forth, back = (
            sizes(architecture, dtype, heads, groups, headdim, dstate, 8192, 0, way) for way in (False, True)
        )
        onward = {**given, "EVERY": forth.every, "GRADIENT": False, "dy": None, "of_gate": None}
        backward = {**given, "EVERY": back.every, "GRADIENT": True}
        for suffix, name, config, constants in (
            ("", "steps_kernel", forth.steps, onward),
            ("", "states_kernel", forth.states, onward),
            ("", "scan_kernel", forth.scan, onward),
            (" backwards", "steps_kernel", back.steps, backward),
            (" backwards", "states_kernel", back.states, backward),
            (" gate backwards", "scan_kernel", back.scan, backward),
            ("", "inputs_kernel", back.inputs, backward),
            ("", "keys_kernel", back.keys, backward),
            ("", "step_gradients_kernel", back.step_gradients, backward),
        ):
            kernel = next((k for k in kernels if k.__name__ == name), None)
            # Backwards, steps and states differ in their block sizes alone: the other specimens see to those.
            if kernel is None or (suffix == " gate backwards" and not gate) or (suffix == " backwards" and scans):
                continue
            if "BP" in config.blocks:
                constants["TILES"] = -(-headdim // config.blocks["BP"])
                constants["STATE_TILES"] = -(-dstate // config.blocks["BN"])
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            found.append(Specimen(label + suffix, kernel, types, config, constants, _ALIGNED))
    return found
