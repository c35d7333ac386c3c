// The torch side of the state-space scan: outputs, and the calls of csrc/cpu/ssd_*.cpp.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ops/ssd_call.h"

namespace mmkernels {

namespace {

using namespace ssd_call;

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                   const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& dt_bias,
                                   const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                                   const MaybeTensor& cu_seqlens, bool dt_softplus, double dt_low, double dt_high,
                                   int64_t chunk_size, bool reverse, bool return_final_states) {
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, reverse};
  const Inputs inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, options);
  Tensor final = empty(return_final_states ? inputs.state_sizes() : std::vector<int64_t>{0}, inputs.arithmetic);
  Tensor y = empty(sizes_of(x), inputs.storage_type);
  run_forward(inputs, true, y.mutable_data_ptr(), false, return_final_states ? final.mutable_data_ptr() : nullptr);
  return {y, final};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors backward(const Tensor& grad_y, const MaybeTensor& grad_final, const Tensor& x, const Tensor& dt,
                     const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                     const MaybeTensor& dt_bias, const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                     const MaybeTensor& cu_seqlens, bool dt_softplus, double dt_low, double dt_high, int64_t chunk_size,
                     bool reverse) {
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, reverse};
  const Inputs inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, options);
  check_same(grad_y, x, "grad_y");
  const Tensor grad = dense_last(grad_y);
  MaybeTensor final, y;
  if (grad_final) {
    check_shape(*grad_final, inputs.state_sizes(), "grad_final_states");
    check_dtype(*grad_final, inputs.arithmetic, "grad_final_states");
    final = torch::stable::contiguous(*grad_final);
  }
  if (z) {
    y = empty(sizes_of(x), inputs.arithmetic);
    run_forward(inputs, false, y->mutable_data_ptr(), inputs.arithmetic != inputs.storage_type, nullptr);
  }
  Gradients gradients(inputs, false);
  SsdBackward call;
  inputs.fill(call);
  gradients.fill(call, 0);
  call.grad_y = in_of(grad);
  call.grad_final = final ? final->const_data_ptr() : nullptr;
  call.y = y ? y->const_data_ptr() : nullptr;
  ssd_bwd(call);
  gradients.sum_blocks();
  return {gradients.x, gradients.dt, gradients.sum_A(), gradients.B, gradients.C, gradients.sum_D(), gradients.z,
          gradients.sum_dt_bias(), gradients.initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("ssd_scan", TORCH_BOX(&forward));
  m.impl("ssd_scan_fwd", TORCH_BOX(&forward));
  m.impl("ssd_scan_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
