// The torch side of the recurrent step: checks, the output, and the call of csrc/cpu/ssd_update.cpp.
#include "cpu/ssd_update.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/integers.h"
#include "common/tensor.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

void check_shape(const Tensor& tensor, std::vector<int64_t> sizes, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  STD_TORCH_CHECK(same, "ssd_update: ", name, " has the wrong shape");
}

// x, z, B or C with the sizes of its last two dimensions; or dt, whose last dimension is heads.
SsdVector view_of(const Tensor& tensor, const char* name, bool several, bool items) {
  SsdVector view;
  view.data = tensor.const_data_ptr();
  view.storage = storage_of(tensor, name);
  view.row = tensor.stride(0);
  view.token = several ? tensor.stride(1) : 0;
  view.head = tensor.stride(several ? 2 : 1);
  view.item = items ? tensor.stride(several ? 3 : 2) : 0;
  return view;
}

SsdVector per_head(const Tensor& tensor, const char* name) {
  SsdVector view;
  view.data = tensor.const_data_ptr();
  view.storage = storage_of(tensor, name);
  view.head = tensor.stride(0);
  view.item = tensor.dim() == 2 ? tensor.stride(1) : 0;
  return view;
}

Tensor update(Tensor state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
              const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& dt_bias, const MaybeTensor& state_indices,
              bool dt_softplus, double dt_low, double dt_high) {
  STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "ssd_update: x must be (batch, [seqlen,] nheads, headdim)");
  STD_TORCH_CHECK(B.dim() == x.dim() && state.dim() == 4, "ssd_update: B or state has the wrong shape");
  const bool several = x.dim() == 4;
  SsdUpdate call;
  call.storage = storage_of(x, "x");
  call.state_storage = storage_of(state, "state");
  STD_TORCH_CHECK((call.storage == Storage::f64) == (call.state_storage == Storage::f64),
                  "ssd_update: float64 x needs a float64 state and the other way round");
  call.batch = x.size(0);
  call.tokens = several ? x.size(1) : 1;
  call.heads = x.size(several ? 2 : 1);
  call.headdim = x.size(several ? 3 : 2);
  call.groups = B.size(several ? 2 : 1);
  call.dstate = B.size(several ? 3 : 2);
  call.softplus = dt_softplus;
  call.low = dt_low;
  call.high = dt_high;
  const auto lead = [&](std::vector<int64_t> rest) {
    std::vector<int64_t> sizes{call.batch};
    if (several) sizes.push_back(call.tokens);
    sizes.insert(sizes.end(), rest.begin(), rest.end());
    return sizes;
  };
  STD_TORCH_CHECK(call.groups > 0 && call.heads % call.groups == 0, "ssd_update: groups must divide the heads");
  check_shape(dt, lead({call.heads}), "dt");
  check_shape(A, {call.heads}, "A");
  check_shape(C, lead({call.groups, call.dstate}), "C");
  check_shape(state, {state.size(0), call.heads, call.headdim, call.dstate}, "state");
  if (z) check_shape(*z, lead({call.heads, call.headdim}), "z");
  if (dt_bias) check_shape(*dt_bias, {call.heads}, "dt_bias");
  if (D && D->dim() == 2) check_shape(*D, {call.heads, call.headdim}, "D");
  if (D && D->dim() != 2) check_shape(*D, {call.heads}, "D");
  const Slots slots("ssd_update", state_indices, call.batch, state.size(0));

  call.x = view_of(x, "x", several, true);
  call.B = view_of(B, "B", several, true);
  call.C = view_of(C, "C", several, true);
  call.dt = view_of(dt, "dt", several, false);
  call.A = per_head(A, "A");
  if (z) call.z = view_of(*z, "z", several, true);
  if (dt_bias) call.dt_bias = per_head(*dt_bias, "dt_bias");
  if (D) call.D = per_head(*D, "D");
  Tensor y = empty(sizes_of(x), x.scalar_type());
  call.y = y.mutable_data_ptr();
  call.slots = slots.data();
  const bool dense = call.dstate <= 1 || state.stride(3) == 1;
  Tensor walked = dense ? state : torch::stable::contiguous(state);
  call.state = walked.mutable_data_ptr();
  call.state_slot = walked.stride(0);
  call.state_head = walked.stride(1);
  call.state_row = walked.stride(2);
  ssd_update(call);
  if (!dense) torch::stable::copy_(state, walked);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("ssd_update", TORCH_BOX(&update)); }

}  // namespace mmkernels
