// RMS norm with an optional SiLU gate: what the kernels read and write.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// Parameters, statistics and parameter gradients are in the arithmetic type of the storage.
struct GatedRmsNorm {
  Storage storage;
  int64_t rows, dim;         // dim is a multiple of group_size
  int64_t group_size;        // one root mean square for so many consecutive channels
  int64_t parameter_stride;  // between the parameters of neighbouring groups: group_size, or 0 when groups share them
  bool norm_before_gate;     // else the gate comes first
  double eps;
  RowsIn x, z;               // z.data null: no gate
  const void* weight;
  const void* bias;          // null: none
};

struct GatedRmsNormForward : GatedRmsNorm {
  RowsOut y;
  void* rstd;  // (rows, dim / group_size): 1 / sqrt(mean square + eps); null: not wanted
};

struct GatedRmsNormBackward : GatedRmsNorm {
  RowsIn grad_y;
  const void* rstd;
  RowsOut grad_x, grad_z;
  // (row_blocks, parameter_count) partial sums, one row a block of rows; null: parameter gradients are not wanted.
  void* grad_weight;
  void* grad_bias;  // null also when there is no bias
  int64_t row_blocks, parameter_count;
};

// Blocks of rows whose parameter gradients are summed apart: by the number of rows alone, never by that of threads.
inline int64_t gated_rms_norm_row_blocks(int64_t rows) {
  const int64_t blocks = (rows + 31) / 32;
  return blocks < 64 ? blocks : 64;
}

MMK_KERNEL(gated_rms_norm_fwd, GatedRmsNormForward)
MMK_KERNEL(gated_rms_norm_bwd, GatedRmsNormBackward)

}  // namespace mmkernels
