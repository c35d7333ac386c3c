// y = x W^T + b for a few rows of x: what the kernel reads and writes.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

struct DecodeLinear {
  Storage x_storage, weight_storage, bias_storage, y_storage;  // f64 all together or not at all
  int64_t rows, in, out;
  RowsIn x;
  RowsIn weight;         // (out, in)
  const void* bias;      // (out,), dense; null: none
  RowsOut y;
  void* packed;          // decode_linear_packed(rows, in) elements of the arithmetic type, 64-byte aligned: workspace
};

// A row of workspace starts on a cache line of its own.
inline int64_t decode_linear_pitch(int64_t in) { return (in + 15) / 16 * 16; }
inline int64_t decode_linear_packed(int64_t rows, int64_t in) { return rows * decode_linear_pitch(in); }

MMK_KERNEL(decode_linear, DecodeLinear)

}  // namespace mmkernels
