// The torch side of the recurrent step: checks, the output, and the call of csrc/cpu/ssd_update.cpp.
//
// The checks are those of the public function, all of them: a decoding loop calls the op without them (Op.direct in
// mmkernels/_dispatch.py).  They come before anything is written.
#include "cpu/ssd_update.h"

#include <limits>

#include <torch/csrc/stable/library.h>

#include "common/integers.h"
#include "common/tensor.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

void check_shape(const View& view, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(view.has_sizes(sizes), "ssd_update: ", name, " has the wrong shape");
}

// x, z, B or C with the strides of its last two dimensions; or dt, whose last dimension is heads.
SsdVector vector_of(const View& view, const char* name, bool several, bool items) {
  SsdVector vector;
  vector.data = view.data;
  vector.storage = storage_of(view.dtype, name);
  const int64_t* stride = view.strides;
  vector.row = *stride++;
  if (several) vector.token = *stride++;
  vector.head = *stride++;
  if (items) vector.item = *stride;
  return vector;
}

SsdVector per_head(const View& view, const char* name) {
  SsdVector vector;
  vector.data = view.data;
  vector.storage = storage_of(view.dtype, name);
  vector.head = view.strides[0];
  vector.item = view.dim == 2 ? view.strides[1] : 0;
  return vector;
}

void walk(SsdUpdate& call, void* state, const View& view) {
  call.state = state;
  call.state_slot = view.strides[0];
  call.state_head = view.strides[1];
  call.state_row = view.strides[2];
}

Tensor update(const Argument& state_, const Argument& x_, const Argument& dt_, const Argument& A_, const Argument& B_,
              const Argument& C_, const Argument& D_, const Argument& dt_bias_, bool dt_softplus, const Argument& z_,
              const Argument& state_indices_, double dt_low, double dt_high) {
  if (dt_high < 0) dt_high = std::numeric_limits<double>::infinity();
  const View state = state_.view(), x = x_.view(), dt = dt_.view(), A = A_.view(), B = B_.view(), C = C_.view(),
             D = D_.view(), z = z_.view(), dt_bias = dt_bias_.view();
  MaybeTensor state_indices;
  if (state_indices_) state_indices = state_indices_.tensor();
  STD_TORCH_CHECK(x.dim == 3 || x.dim == 4, "ssd_update: x must be (batch, [seqlen,] nheads, headdim)");
  STD_TORCH_CHECK(B.dim == x.dim && state.dim == 4, "ssd_update: B or state has the wrong shape");
  const bool several = x.dim == 4;
  const int64_t heads_at = several ? 2 : 1;
  SsdUpdate call;
  call.storage = storage_of(x.dtype, "x");
  call.state_storage = storage_of(state.dtype, "state");
  STD_TORCH_CHECK((call.storage == Storage::f64) == (call.state_storage == Storage::f64),
                  "ssd_update: float64 x needs a float64 state and the other way round");
  STD_TORCH_CHECK(B.dtype == x.dtype && C.dtype == x.dtype && (!z_ || z.dtype == x.dtype),
                  "ssd_update: B, C and z must have the dtype of x");
  STD_TORCH_CHECK(0 <= dt_low && dt_low <= dt_high, "ssd_update: dt_limit must satisfy 0 <= low <= high");
  call.batch = x.sizes[0];
  call.tokens = several ? x.sizes[1] : 1;
  call.heads = x.sizes[heads_at];
  call.headdim = x.sizes[heads_at + 1];
  call.groups = B.sizes[heads_at];
  call.dstate = B.sizes[heads_at + 1];
  call.softplus = dt_softplus;
  call.low = dt_low;
  call.high = dt_high;
  const int64_t tokens = several ? call.tokens : View::kAbsent;
  STD_TORCH_CHECK(call.groups > 0 && call.heads % call.groups == 0, "ssd_update: groups must divide the heads");
  check_shape(dt, {call.batch, tokens, call.heads}, "dt");
  check_shape(A, {call.heads}, "A");
  check_shape(B, {call.batch, tokens, call.groups, call.dstate}, "B");
  check_shape(C, {call.batch, tokens, call.groups, call.dstate}, "C");
  check_shape(state, {state.sizes[0], call.heads, call.headdim, call.dstate}, "state");
  if (z_) check_shape(z, {call.batch, tokens, call.heads, call.headdim}, "z");
  if (dt_bias_) check_shape(dt_bias, {call.heads}, "dt_bias");
  if (D_) check_shape(D, {call.heads, D.dim == 2 ? call.headdim : View::kAbsent}, "D");
  const Slots slots("ssd_update", state_indices, call.batch, state.sizes[0]);

  call.x = vector_of(x, "x", several, true);
  call.B = vector_of(B, "B", several, true);
  call.C = vector_of(C, "C", several, true);
  call.dt = vector_of(dt, "dt", several, false);
  call.A = per_head(A, "A");
  if (z_) call.z = vector_of(z, "z", several, true);
  if (dt_bias_) call.dt_bias = per_head(dt_bias, "dt_bias");
  if (D_) call.D = per_head(D, "D");
  Tensor y = empty(x.sizes, x.dim, x.dtype);
  call.y = y.mutable_data_ptr();
  call.slots = slots.data();
  if (call.dstate <= 1 || state.strides[3] == 1) {
    walk(call, state_.mutable_data(), state);
    ssd_update(call);
  } else {
    Tensor strided = state_.tensor(), dense = torch::stable::contiguous(strided);
    walk(call, dense.mutable_data_ptr(), View(dense));
    ssd_update(call);
    torch::stable::copy_(strided, dense);
  }
  return y;
}

void boxed_update(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const auto tensor = [&](int i) { return Argument::required(stack[i]); };
  const auto maybe = [&](int i) { return Argument::optional(stack[i]); };
  const Argument state = tensor(0), x = tensor(1), dt = tensor(2), A = tensor(3), B = tensor(4), C = tensor(5),
                 D = maybe(6), dt_bias = maybe(7), z = maybe(9), state_indices = maybe(10);
  stack[0] = torch::stable::detail::from(update(state, x, dt, A, B, C, D, dt_bias, to<bool>(stack[8]), z, state_indices,
                                                to<double>(stack[11]), to<double>(stack[12])));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("ssd_update", &boxed_update); }

}  // namespace mmkernels
