"""The ops.  One folder each: api.py (the public functions), reference.py (the oracle), one file per backend."""

from mmkernels.ops.causal_conv1d.api import causal_conv1d, causal_conv1d_update
from mmkernels.ops.gated_rms_norm.api import gated_rms_norm
from mmkernels.ops.ssd.api import ssd_scan, ssd_update

__all__ = ["causal_conv1d", "causal_conv1d_update", "gated_rms_norm", "ssd_scan", "ssd_update"]
