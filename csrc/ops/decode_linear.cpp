// The torch side of decode_linear: checks, the output, workspace, and the call of csrc/cpu/decode_linear.cpp.
#include "cpu/decode_linear.h"

#include <torch/csrc/stable/library.h>

#include "common/parallel.h"
#include "common/tensor.h"

namespace mmkernels {

namespace {

// Of workspace that the thread keeps for its life; what a decode step needs is far less.
constexpr int64_t kKeptBytes = int64_t{1} << 20;

// The checks are all of the public function's (see ssd_update.cpp).
Tensor linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_) {
  const View x(x_), weight(weight_), bias(bias_);
  STD_TORCH_CHECK(x.dim >= 1 && weight.dim == 2 && weight.sizes[1] == x.sizes[x.dim - 1],
                  "decode_linear: x must be (..., in) and weight (out, in)");
  STD_TORCH_CHECK(!bias_ || bias.has_sizes({weight.sizes[0]}), "decode_linear: bias must be (out,)");

  DecodeLinear call;
  call.x_storage = call.y_storage = storage_of(x.dtype, "x");
  call.weight_storage = storage_of(weight.dtype, "weight");
  call.bias_storage = bias_ ? storage_of(bias.dtype, "bias") : call.weight_storage;
  const bool wide = call.x_storage == Storage::f64;
  STD_TORCH_CHECK(wide == (call.weight_storage == Storage::f64) && wide == (call.bias_storage == Storage::f64),
                  "decode_linear: float64 must be the dtype of every tensor or of none");
  const Rows rows = rows_of(x_, x), weights = rows_of(weight_, weight);
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  sizes.back() = call.out = weight.sizes[0];
  Tensor y = empty(sizes.data(), x.dim, x.dtype);
  call.in = rows.dim;
  call.rows = 1;
  for (int64_t d = 0; d + 1 < x.dim; ++d) call.rows *= x.sizes[d];
  if (call.out == 0) call.rows = 0;
  call.x = rows.in();
  call.weight = weights.in();
  const bool dense = !bias_ || bias.sizes[0] <= 1 || bias.strides[0] == 1;
  const std::optional<Tensor> dense_bias = dense ? bias_ : torch::stable::contiguous(*bias_);
  call.bias = dense ? bias.data : dense_bias->const_data_ptr();
  call.y = {y.mutable_data_ptr(), call.out};
  // Read by other threads during the call, which take no scratch of this one.
  const int64_t elements = decode_linear_packed(call.rows, call.in), bytes = elements * (wide ? 8 : 4);
  std::optional<Tensor> packed;
  if (bytes > kKeptBytes) packed = empty({elements}, arithmetic_of(call.x_storage));
  call.packed = packed ? packed->mutable_data_ptr() : thread_scratch(static_cast<size_t>(bytes));
  decode_linear(call);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("decode_linear", TORCH_BOX(&linear));
  m.impl("decode_linear_fwd", TORCH_BOX(&linear));
}

}  // namespace mmkernels
