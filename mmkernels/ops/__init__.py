"""The ops.  One folder each: api.py (the public functions), reference.py (the oracle), one file per backend.

Importing this package registers every op; the public functions are names of `mmkernels` itself.
"""

import mmkernels.ops.causal_conv1d.api
import mmkernels.ops.decode_linear.api
import mmkernels.ops.gated_rms_norm.api
import mmkernels.ops.mamba2_step.api
import mmkernels.ops.mma_attention.api
import mmkernels.ops.scan2d.api
import mmkernels.ops.scan2d.merge
import mmkernels.ops.ssd.api
import mmkernels.ops.token_pruning.api
import mmkernels.ops.token_pruning.merging
import mmkernels.ops.token_pruning.received  # noqa: F401
