// The torch side of decode_linear: checks, the output, workspace, and the call of csrc/cpu/decode_linear.cpp.
#include "cpu/decode_linear.h"

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"

namespace mmkernels {

namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Rows rows = rows_of(x), weights = rows_of(weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == rows.dim, "decode_linear: weight must be (out, in)");
  std::optional<Tensor> dense_bias;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "decode_linear: bias must be (out,)");
    dense_bias = torch::stable::contiguous(*bias);
  }

  DecodeLinear call;
  call.x_storage = call.y_storage = storage_of(x, "x");
  call.weight_storage = storage_of(weight, "weight");
  call.bias_storage = bias ? storage_of(*bias, "bias") : call.weight_storage;
  const bool wide = call.x_storage == Storage::f64;
  STD_TORCH_CHECK(wide == (call.weight_storage == Storage::f64) && wide == (call.bias_storage == Storage::f64),
                  "decode_linear: float64 must be the dtype of every tensor or of none");
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = call.out = weight.size(0);
  Tensor y = empty(sizes, x.scalar_type());
  call.in = rows.dim;
  call.rows = call.out == 0 ? 0 : y.numel() / call.out;
  call.x = rows.in();
  call.weight = weights.in();
  call.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
  call.y = {y.mutable_data_ptr(), call.out};
  Tensor packed = empty({decode_linear_packed(call.rows, call.in)}, arithmetic_of(call.x_storage));
  call.packed = packed.mutable_data_ptr();
  decode_linear(call);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("decode_linear", TORCH_BOX(&linear));
  m.impl("decode_linear_fwd", TORCH_BOX(&linear));
}

}  // namespace mmkernels
