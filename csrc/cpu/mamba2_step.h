// The parts of a Mamba-2 step that no other op has: residual sum and norm, small parameters.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// sum = hidden + residual in its storage, normed = sum / rms(sum) * weight in the arithmetic type.
struct AddNorm {
  Storage hidden_storage, residual_storage, sum_storage, weight_storage;  // f64 all together or not at all
  int64_t rows, dim;
  double eps;
  RowsIn hidden;
  RowsIn residual;     // data null: 0
  RowsOut sum;
  const void* weight;  // (dim,), dense
  void* normed;        // (rows, dim), dense
};

MMK_KERNEL(add_norm, AddNorm)

// Elements of any storage type in the arithmetic type: as they are, or -exp of them.
struct Widen {
  Storage storage;
  bool wide;  // the arithmetic type is double
  bool negative_exp;
  int64_t count, stride;
  const void* from;
  void* to;
};

MMK_KERNEL(widen, Widen)

}  // namespace mmkernels
