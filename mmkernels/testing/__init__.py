"""How ops are verified, importable by users who add their own: cases, tolerance policy, poison, backends to test."""

from mmkernels.testing import (  # noqa: F401
    cases_causal_conv1d,
    cases_decode_linear,
    cases_gated_rms_norm,
    cases_mamba2_step,
    cases_mma_attention,
    cases_scan2d,
    cases_ssd,
    cases_token_pruning,
)
from mmkernels.testing.cases import CASES, Case, register_cases
from mmkernels.testing.poison import poisoned_allocations
from mmkernels.testing.tolerance import assert_within, error_of, rounding_band

__all__ = ["CASES", "Case", "assert_within", "error_of", "poisoned_allocations", "register_cases", "rounding_band"]
