// Gated RMS norms of several scans, merged: what the kernels read and write.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// (batch, scan, token, channel) with dense channels; strides in elements.
struct ScansIn {
  const void* data = nullptr;
  int64_t batch = 0, scan = 0, token = 0;
};

// Parameters, statistics and parameter gradients are in the arithmetic type of the storage.
struct MergedGatedRmsNorm {
  Storage storage;
  int64_t batch, scans, seqlen, dim;  // dim is a multiple of group_size
  int64_t group_size;
  int64_t parameter_stride;  // between the weights of neighbouring groups: group_size, or 0 when groups share them
  double eps, factor;        // factor of the sum: 1, or 1 / scans
  ScansIn y, z;              // z has no scan; z.data null: no gate
  const void* weight;
};

struct MergedGatedRmsNormForward : MergedGatedRmsNorm {
  void* out;   // (batch, seqlen, dim), dense
  void* rstd;  // (batch, scans, seqlen, dim / group_size): 1 / sqrt(mean square + eps); null: not wanted
};

struct MergedGatedRmsNormBackward : MergedGatedRmsNorm {
  ScansIn grad_out;  // no scan
  const void* rstd;
  void *grad_y, *grad_z;  // dense; grad_z null without a gate
  void* grad_weight;      // (row_blocks, parameter_count) partial sums; the first is their sum in the end
  int64_t row_blocks, parameter_count;
};

MMK_KERNEL(merged_gated_rms_norm_fwd, MergedGatedRmsNormForward)
MMK_KERNEL(merged_gated_rms_norm_bwd, MergedGatedRmsNormBackward)

}  // namespace mmkernels
