// The torch side of merged gated RMS norms: checks, outputs, and the calls of csrc/cpu/merged_gated_rms_norm.cpp.
#include "cpu/merged_gated_rms_norm.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "cpu/gated_rms_norm.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

Tensor dense_channels(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The tensors of a call in the form kernels read; owns what had to be converted.
struct Inputs {
  ScalarType arithmetic;
  Tensor y, weight;
  MaybeTensor z;
  int64_t batch, scans, seqlen, dim, group_size;

  Inputs(const Tensor& y_, const Tensor& weight_, const MaybeTensor& z_, int64_t group_size_)
      : arithmetic(arithmetic_of(storage_of(y_, "y"))), y(dense_channels(y_)), weight(parameter_of(weight_, arithmetic)),
        group_size(group_size_) {
    STD_TORCH_CHECK(y.dim() == 4 && y.size(1) > 0, "merged_gated_rms_norm: y must be (batch, scans, seqlen, dim)");
    batch = y.size(0), scans = y.size(1), seqlen = y.size(2), dim = y.size(3);
    STD_TORCH_CHECK(group_size > 0 && dim % group_size == 0, "merged_gated_rms_norm: group_size must divide dim");
    STD_TORCH_CHECK(weight.dim() == 1 && (weight.numel() == dim || weight.numel() == group_size),
                    "merged_gated_rms_norm: weight must have one element a channel of y or of a group");
    if (z_) {
      check_merged(*z_, "z");
      z = dense_channels(*z_);
    }
  }

  void check_merged(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == batch && tensor.size(1) == seqlen && tensor.size(2) == dim &&
                        tensor.scalar_type() == y.scalar_type(),
                    "merged_gated_rms_norm: ", name, " must be (batch, seqlen, dim) in the dtype of y");
  }

  std::vector<int64_t> merged() const { return {batch, seqlen, dim}; }

  void fill(MergedGatedRmsNorm& call, double eps, bool mean) const {
    call.storage = storage_of(y, "y");
    call.batch = batch, call.scans = scans, call.seqlen = seqlen, call.dim = dim, call.group_size = group_size;
    call.parameter_stride = weight.numel() == dim ? group_size : 0;
    call.eps = eps, call.factor = mean ? 1.0 / static_cast<double>(scans) : 1.0;
    call.y = {y.const_data_ptr(), y.stride(0), y.stride(1), y.stride(2)};
    if (z) call.z = {z->const_data_ptr(), z->stride(0), 0, z->stride(1)};
    call.weight = weight.const_data_ptr();
  }
};

Tensor run_forward(const Inputs& inputs, double eps, bool mean, void* rstd) {
  Tensor out = empty(inputs.merged(), inputs.y.scalar_type());
  MergedGatedRmsNormForward call;
  inputs.fill(call, eps, mean);
  call.out = out.mutable_data_ptr();
  call.rstd = rstd;
  merged_gated_rms_norm_fwd(call);
  return out;
}

Tensor inference(const Tensor& y, const Tensor& weight, const MaybeTensor& z, double eps, int64_t group_size, bool mean) {
  return run_forward(Inputs(y, weight, z, group_size), eps, mean, nullptr);
}

std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& weight, const MaybeTensor& z, double eps,
                                   int64_t group_size, bool mean) {
  const Inputs inputs(y, weight, z, group_size);
  Tensor rstd = empty({inputs.batch, inputs.scans, inputs.seqlen, inputs.dim / group_size}, inputs.arithmetic);
  Tensor out = run_forward(inputs, eps, mean, rstd.mutable_data_ptr());
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& y, const Tensor& weight,
                                            const MaybeTensor& z, const Tensor& rstd, double eps, int64_t group_size,
                                            bool mean) {
  const Inputs inputs(y, weight, z, group_size);
  inputs.check_merged(grad_out, "grad_out");
  const Tensor grad = dense_channels(grad_out), statistics = torch::stable::contiguous(rstd);
  Tensor grad_y = empty(sizes_of(y), y.scalar_type());
  Tensor grad_z = empty(z ? inputs.merged() : std::vector<int64_t>{0}, y.scalar_type());
  MergedGatedRmsNormBackward call;
  inputs.fill(call, eps, mean);
  call.grad_out = {grad.const_data_ptr(), grad.stride(0), 0, grad.stride(1)};
  call.rstd = statistics.const_data_ptr();
  call.grad_y = grad_y.mutable_data_ptr();
  call.grad_z = z ? grad_z.mutable_data_ptr() : nullptr;
  const int64_t rows = inputs.batch * inputs.seqlen;
  call.row_blocks = rows > 0 ? gated_rms_norm_row_blocks(rows) : 1;  // no rows sum up to zeros
  call.parameter_count = inputs.weight.numel();
  Tensor sums = empty({call.row_blocks, call.parameter_count}, inputs.arithmetic);
  call.grad_weight = sums.mutable_data_ptr();
  merged_gated_rms_norm_bwd(call);
  Tensor grad_weight = empty(sizes_of(weight), weight.scalar_type());
  torch::stable::copy_(grad_weight, torch::stable::select(sums, 0, 0));
  return {grad_y, grad_weight, grad_z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("merged_gated_rms_norm", TORCH_BOX(&inference));
  m.impl("merged_gated_rms_norm_fwd", TORCH_BOX(&forward));
  m.impl("merged_gated_rms_norm_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
