// The torch side of the gated RMS norm: checks, outputs, and the call of the kernels in csrc/cpu/gated_rms_norm.cpp.
#include "cpu/gated_rms_norm.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensors of a call in the form kernels read; owns what had to be converted.
struct Inputs {
  Storage storage;
  ScalarType arithmetic;
  Rows x;
  std::optional<Rows> z;
  Tensor weight;
  MaybeTensor bias;

  Inputs(const Tensor& x_, const Tensor& weight_, const MaybeTensor& z_, const MaybeTensor& bias_, int64_t group_size)
      : storage(storage_of(x_, "x")), arithmetic(arithmetic_of(storage)), x(rows_of(x_)),
        weight(parameter_of(weight_, arithmetic)) {
    STD_TORCH_CHECK(group_size > 0 && x.dim % group_size == 0, "group_size must divide the last dimension of x");
    STD_TORCH_CHECK(weight.dim() == 1 && (weight.numel() == x.dim || weight.numel() == group_size),
                    "weight must have one element a channel of x or of a group");
    if (z_) {
      check_same(*z_, x_, "z");
      z = rows_of(*z_);
    }
    if (bias_) {
      STD_TORCH_CHECK(bias_->dim() == 1 && bias_->numel() == weight.numel(), "bias must have the shape of weight");
      bias = parameter_of(*bias_, arithmetic);
    }
  }

  void fill(GatedRmsNorm& call, int64_t group_size, bool norm_before_gate) const {
    call.storage = storage;
    call.rows = x.rows;
    call.dim = x.dim;
    call.group_size = group_size;
    call.parameter_stride = weight.numel() == x.dim ? group_size : 0;
    call.norm_before_gate = norm_before_gate;
    call.x = x.in();
    if (z) call.z = z->in();
    call.weight = weight.const_data_ptr();
    call.bias = bias ? bias->const_data_ptr() : nullptr;
  }
};

Tensor run_forward(const Inputs& inputs, const Tensor& x, double eps, int64_t group_size, bool norm_before_gate,
                   void* rstd) {
  Tensor y = empty(sizes_of(x), x.scalar_type());
  GatedRmsNormForward call;
  inputs.fill(call, group_size, norm_before_gate);
  call.eps = eps;
  call.y = {y.mutable_data_ptr(), inputs.x.dim};
  call.rstd = rstd;
  gated_rms_norm_fwd(call);
  return y;
}

Tensor inference(const Tensor& x, const Tensor& weight, const MaybeTensor& z, const MaybeTensor& bias, double eps,
                 int64_t group_size, bool norm_before_gate) {
  return run_forward(Inputs(x, weight, z, bias, group_size), x, eps, group_size, norm_before_gate, nullptr);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const MaybeTensor& z, const MaybeTensor& bias,
                                   double eps, int64_t group_size, bool norm_before_gate) {
  const Inputs inputs(x, weight, z, bias, group_size);
  std::vector<int64_t> statistics = sizes_of(x);
  statistics.back() /= group_size;
  Tensor rstd = empty(statistics, inputs.arithmetic);
  Tensor y = run_forward(inputs, x, eps, group_size, norm_before_gate, rstd.mutable_data_ptr());
  return {y, rstd};
}

// The first row of the partial sums, in the parameter's own type; empty when it was not asked for.
Tensor parameter_gradient(const Tensor& partial, int64_t blocks, const Tensor& parameter) {
  if (partial.numel() == 0) return empty({0}, parameter.scalar_type());
  Tensor sums = blocks == 1 ? partial : torch::stable::clone(torch::stable::select(partial, 0, 0));
  sums = torch::stable::view(sums, {parameter.numel()});
  return sums.scalar_type() == parameter.scalar_type() ? sums : torch::stable::to(sums, parameter.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                    const MaybeTensor& z, const MaybeTensor& bias, const Tensor& rstd,
                                                    double eps, int64_t group_size, bool norm_before_gate,
                                                    bool parameter_gradients) {
  const Inputs inputs(x, weight, z, bias, group_size);
  check_same(grad_y, x, "grad_y");
  const Rows grad_rows = rows_of(grad_y);
  const Tensor statistics = torch::stable::contiguous(rstd);
  Tensor grad_x = empty(sizes_of(x), x.scalar_type());
  Tensor grad_z = empty(z ? sizes_of(x) : std::vector<int64_t>{0}, x.scalar_type());

  GatedRmsNormBackward call;
  inputs.fill(call, group_size, norm_before_gate);
  call.eps = eps;
  call.grad_y = grad_rows.in();
  call.rstd = statistics.const_data_ptr();
  call.grad_x = {grad_x.mutable_data_ptr(), inputs.x.dim};
  call.grad_z = {z ? grad_z.mutable_data_ptr() : nullptr, inputs.x.dim};
  // At least one block, so that no rows sum up to zero gradients.
  call.row_blocks = inputs.x.rows > 0 ? gated_rms_norm_row_blocks(inputs.x.rows) : 1;
  call.parameter_count = inputs.weight.numel();
  const auto partial = [&](bool wanted) {
    return wanted ? empty({call.row_blocks, call.parameter_count}, inputs.arithmetic) : empty({0}, inputs.arithmetic);
  };
  const Tensor weight_sums = partial(parameter_gradients);
  const Tensor bias_sums = partial(parameter_gradients && bias);
  call.grad_weight = parameter_gradients ? weight_sums.mutable_data_ptr() : nullptr;
  call.grad_bias = parameter_gradients && bias ? bias_sums.mutable_data_ptr() : nullptr;
  gated_rms_norm_bwd(call);
  return {grad_x, parameter_gradient(weight_sums, call.row_blocks, weight), grad_z,
          parameter_gradient(bias_sums, call.row_blocks, bias ? *bias : weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&inference));
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&forward));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
