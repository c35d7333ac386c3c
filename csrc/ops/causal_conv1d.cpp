// The torch side of the causal convolution: checks, the cut into pieces, outputs, and the calls of csrc/cpu/causal_conv1d*.
#include "cpu/causal_conv1d.h"

#include <cstring>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/integers.h"
#include "common/tensor.h"
#include "ops/scan_orders.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// A tensor whose channels are dense: itself, or a copy where they are not.
Tensor dense_channels(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

TokensIn tokens_in(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
TokensOut tokens_out(const Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)}; }
StatesIn states_in(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
StatesOut states_out(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_states(const Tensor& states, const Tensor& x, int64_t rows, int64_t history, const char* name) {
  STD_TORCH_CHECK(states.dim() == 3 && states.size(0) == rows && states.size(1) == x.size(2) &&
                      states.size(2) == history && states.scalar_type() == x.scalar_type(),
                  "causal_conv1d: ", name, " must be (rows, dim, width - 1) in the dtype of x");
}

// Every run of a call, cut into pieces of bounded length.
class Pieces {
 public:
  std::vector<ConvPiece> list;

  Pieces(int64_t batch, int64_t seqlen, const MaybeTensor& seq_idx, const MaybeTensor& cu_seqlens, bool states,
         int64_t step)
      : seqlen_(seqlen), step_(step), states_(states) {
    if (cu_seqlens) {
      add_packed(integers_of(*cu_seqlens));
    } else if (seq_idx && seqlen > 0) {
      add_ids(integers_of(*seq_idx), batch);
    } else {
      for (int64_t row = 0; row < batch; ++row) add(row, first(0, seqlen), seqlen, row, row, false);
    }
  }

 private:
  int64_t seqlen_, step_;
  bool states_;

  // The token that a scan of tokens [begin, end) meets first.
  int64_t first(int64_t begin, int64_t end) const { return step_ > 0 ? begin : end - 1; }

  void add(int64_t row, int64_t origin, int64_t length, int64_t initial, int64_t final, bool padding) {
    if (!states_) initial = -1;
    int64_t begin = 0;
    do {
      const int64_t end = begin + kConvPieceTokens < length ? begin + kConvPieceTokens : length;
      list.push_back({row, origin, length, begin, end, initial, final, padding});
      begin = end;
    } while (begin < length);
  }

  void add_packed(const std::vector<int64_t>& bounds) {
    STD_TORCH_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == seqlen_,
                    "causal_conv1d: cu_seqlens must run from 0 to seqlen");
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      STD_TORCH_CHECK(bounds[i] <= bounds[i + 1], "causal_conv1d: cu_seqlens must not decrease");
    }
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      const int64_t sequence = static_cast<int64_t>(i);
      add(0, first(bounds[i], bounds[i + 1]), bounds[i + 1] - bounds[i], sequence, sequence, false);
    }
  }

  // Runs in scan order; the first continues the states if its id is 0.
  void add_ids(const std::vector<int64_t>& ids, int64_t batch) {
    const int64_t origin = first(0, seqlen_);
    for (int64_t row = 0; row < batch; ++row) {
      const auto id = [&](int64_t position) { return ids[row * seqlen_ + origin + step_ * position]; };
      for (int64_t begin = 0, end; begin < seqlen_; begin = end) {
        end = begin + 1;
        while (end < seqlen_ && id(end) == id(begin)) ++end;
        add(row, origin + step_ * begin, end - begin, begin == 0 && id(0) == 0 ? row : -1, end == seqlen_ ? row : -1,
            id(begin) < 0);
      }
    }
  }
};

// The tensors of a call in the form kernels read; owns what had to be converted.
struct Inputs {
  Storage storage;
  ScalarType arithmetic;
  int64_t width, state_rows;
  Tensor x, taps;
  MaybeTensor bias, initial;
  Pieces pieces;
  bool silu;
  int64_t step;

  Inputs(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias_, const MaybeTensor& initial_,
         const MaybeTensor& seq_idx, const MaybeTensor& cu_seqlens, bool silu_, bool reverse)
      : storage(storage_of(checked(x_, weight, bias_, seq_idx, cu_seqlens), "x")), arithmetic(arithmetic_of(storage)),
        width(weight.size(1)), state_rows(cu_seqlens ? cu_seqlens->size(0) - 1 : x_.size(0)), x(dense_channels(x_)),
        taps(parameter_of(torch::stable::transpose(weight, 0, 1), arithmetic)), initial(initial_),
        pieces(x_.size(0), x_.size(1), seq_idx, cu_seqlens, initial_.has_value(), reverse ? -1 : 1), silu(silu_),
        step(reverse ? -1 : 1) {
    if (bias_) bias = parameter_of(*bias_, arithmetic);
    if (initial_) check_states(*initial_, x_, state_rows, width - 1, "initial_states");
  }

  static const Tensor& checked(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                               const MaybeTensor& seq_idx, const MaybeTensor& cu_seqlens) {
    STD_TORCH_CHECK(x.dim() == 3, "causal_conv1d: x must be (batch, seqlen, dim)");
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == x.size(2) && weight.size(1) >= 1,
                    "causal_conv1d: weight must be (dim, width)");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == x.size(2)), "causal_conv1d: bias must be (dim,)");
    STD_TORCH_CHECK(!seq_idx || (seq_idx->dim() == 2 && seq_idx->size(0) == x.size(0) &&
                                 seq_idx->size(1) == x.size(1)),
                    "causal_conv1d: seq_idx must be (batch, seqlen)");
    STD_TORCH_CHECK(!cu_seqlens || (cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1 && x.size(0) == 1 && !seq_idx),
                    "causal_conv1d: cu_seqlens must be (sequences + 1,), with a batch of 1 and without seq_idx");
    return x;
  }

  void fill(CausalConv1d& call) const {
    call.storage = storage;
    call.dim = x.size(2);
    call.width = width;
    call.step = step;
    call.pieces = pieces.list.data();
    call.piece_count = static_cast<int64_t>(pieces.list.size());
    call.silu = silu;
    call.x = tokens_in(x);
    call.taps = taps.const_data_ptr();
    call.bias = bias ? bias->const_data_ptr() : nullptr;
    if (initial) call.initial = states_in(*initial);
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                   const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                                   const MaybeTensor& cu_seqlens, bool silu, bool reverse, bool return_final_states) {
  const Inputs inputs(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, reverse);
  Tensor y = empty(sizes_of(x), x.scalar_type());
  Tensor final = empty(return_final_states ? std::vector<int64_t>{inputs.state_rows, x.size(2), inputs.width - 1}
                                           : std::vector<int64_t>{0},
                       x.scalar_type());
  CausalConv1dForward call;
  inputs.fill(call);
  call.y = tokens_out(y);
  if (return_final_states) call.final = states_out(final);
  causal_conv1d_fwd(call);
  return {y, final};
}

// A part of the sums in the shape and dtype of the parameter; empty where there is no parameter.
Tensor parameter_gradient(const Tensor& sums, const MaybeTensor& parameter, ScalarType dtype) {
  Tensor grad = empty(parameter ? sizes_of(*parameter) : std::vector<int64_t>{0}, dtype);
  if (parameter) torch::stable::copy_(grad, sums);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const MaybeTensor& grad_final,
                                                    const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                                    const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                                                    const MaybeTensor& cu_seqlens, bool silu, bool reverse,
                                                    bool parameter_gradients) {
  const Inputs inputs(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu, reverse);
  check_same(grad_y, x, "grad_y");
  if (grad_final) check_states(*grad_final, x, inputs.state_rows, inputs.width - 1, "grad_final");
  const Tensor grads = dense_channels(grad_y);
  Tensor grad_x = empty(sizes_of(x), x.scalar_type());
  Tensor grad_initial =
      empty(initial_states ? sizes_of(*initial_states) : std::vector<int64_t>{0}, x.scalar_type());

  CausalConv1dBackward call;
  inputs.fill(call);
  call.grad_y = tokens_in(grads);
  if (grad_final) call.grad_final = states_in(*grad_final);
  call.grad_x = tokens_out(grad_x);
  if (initial_states) {
    if (seq_idx) torch::stable::zero_(grad_initial);  // rows whose first id is not 0 continue nothing
    call.grad_initial = states_out(grad_initial);
  }
  call.blocks = causal_conv1d_blocks(call.piece_count);
  Tensor sums = empty({parameter_gradients ? call.blocks : 1, inputs.width + 1, call.dim}, inputs.arithmetic);
  call.sums = parameter_gradients ? sums.mutable_data_ptr() : nullptr;
  causal_conv1d_bwd(call);

  const MaybeTensor wanted_weight = parameter_gradients ? MaybeTensor(weight) : MaybeTensor();
  const MaybeTensor wanted_bias = parameter_gradients ? bias : MaybeTensor();
  Tensor first = torch::stable::select(sums, 0, 0);
  Tensor taps = torch::stable::narrow(first, 0, 0, inputs.width);
  return {grad_x, parameter_gradient(torch::stable::transpose(taps, 0, 1), wanted_weight, weight.scalar_type()),
          parameter_gradient(torch::stable::select(first, 0, inputs.width), wanted_bias,
                             bias ? bias->scalar_type() : weight.scalar_type()),
          grad_initial};
}

// ---- scans of a grid: x (batch, scans, seqlen, dim), parameters with a leading dimension of scans -----------------------

// The inputs of direction k: nothing is permuted, and x may be expanded over the directions.
Inputs direction(int64_t k, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool silu) {
  const auto of = [&](const Tensor& tensor, int64_t dim) { return torch::stable::select(tensor, dim, k); };
  return Inputs(of(x, 1), of(weight, 0), bias ? MaybeTensor(of(*bias, 0)) : MaybeTensor(), {}, {}, {}, silu, false);
}

void check_directions(const Orders& orders, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == orders.count && x.size(2) == orders.length,
                  "causal_conv1d_2d: x must be (batch, scans, seqlen, dim), orders (scans, seqlen)");
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == orders.count && (!bias || bias->size(0) == orders.count),
                  "causal_conv1d_2d: parameters must have one slice a scan");
}

Tensor forward_2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& orders_, bool silu) {
  const Orders orders("causal_conv1d_2d", orders_);
  check_directions(orders, x, weight, bias);
  Tensor y = empty(sizes_of(x), x.scalar_type());
  for (int64_t k = 0; k < orders.count; ++k) {
    const Inputs inputs = direction(k, x, weight, bias, silu);
    CausalConv1dForward call;
    inputs.fill(call);
    call.order = orders[k];
    call.y = tokens_out(torch::stable::select(y, 1, k));
    causal_conv1d_fwd(call);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward_2d(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                               const MaybeTensor& bias, const Tensor& orders_, bool silu) {
  const Orders orders("causal_conv1d_2d", orders_);
  check_directions(orders, x, weight, bias);
  check_same(grad_y, x, "grad_y");
  const Tensor grads = dense_channels(grad_y);
  Tensor grad_x = empty(sizes_of(x), x.scalar_type()), grad_weight = empty(sizes_of(weight), weight.scalar_type());
  Tensor grad_bias = empty(bias ? sizes_of(*bias) : std::vector<int64_t>{0}, bias ? bias->scalar_type() : weight.scalar_type());
  for (int64_t k = 0; k < orders.count; ++k) {
    const Inputs inputs = direction(k, x, weight, bias, silu);
    CausalConv1dBackward call;
    inputs.fill(call);
    call.order = orders[k];
    call.grad_y = tokens_in(torch::stable::select(grads, 1, k));
    call.grad_x = tokens_out(torch::stable::select(grad_x, 1, k));
    call.blocks = causal_conv1d_blocks(call.piece_count);
    Tensor sums = empty({call.blocks, inputs.width + 1, call.dim}, inputs.arithmetic);
    call.sums = sums.mutable_data_ptr();
    causal_conv1d_bwd(call);
    Tensor first = torch::stable::select(sums, 0, 0);
    const auto keep = [&](const Tensor& all, const Tensor& sum) {
      Tensor row = torch::stable::select(all, 0, k);
      torch::stable::copy_(row, sum);
    };
    Tensor taps = torch::stable::narrow(first, 0, 0, inputs.width);
    keep(grad_weight, torch::stable::transpose(taps, 0, 1));
    if (bias) keep(grad_bias, torch::stable::select(first, 0, inputs.width));
  }
  return {grad_x, grad_weight, grad_bias};
}

// As in ssd_update.cpp, the checks are all of the public function's, before anything is written.
Tensor update(const Tensor& x_, Tensor conv_state, const Tensor& weight_, const MaybeTensor& bias_, bool silu,
              const MaybeTensor& state_indices) {
  View x(x_);
  const View state(conv_state), weight(weight_), bias(bias_);
  STD_TORCH_CHECK(x.dim == 2 || x.dim == 3, "causal_conv1d_update: x must be (batch, [seqlen,] dim)");
  const bool several = x.dim == 3;
  const int64_t batch = x.sizes[0], dim = x.sizes[x.dim - 1];
  STD_TORCH_CHECK(weight.dim == 2 && weight.sizes[0] == dim && weight.sizes[1] >= 1,
                  "causal_conv1d_update: weight must be (dim, width)");
  STD_TORCH_CHECK(state.dim == 3 && state.sizes[1] == dim && state.sizes[2] >= weight.sizes[1] - 1,
                  "causal_conv1d_update: conv_state must be (slots, dim, width - 1 or more)");
  STD_TORCH_CHECK(!bias_ || bias.has_sizes({dim}), "causal_conv1d_update: bias must be (dim,)");

  CausalConv1dUpdate call;
  call.storage = storage_of(x.dtype, "x");
  call.state_storage = storage_of(state.dtype, "conv_state");
  STD_TORCH_CHECK((call.storage == Storage::f64) == (call.state_storage == Storage::f64),
                  "causal_conv1d_update: float64 x needs a float64 conv_state and the other way round");
  call.weight_storage = storage_of(weight.dtype, "weight");
  call.bias_storage = bias_ ? storage_of(bias.dtype, "bias") : Storage::f32;
  const Slots slots("causal_conv1d_update", state_indices, batch, state.sizes[0]);
  const bool dense = dim <= 1 || x.strides[x.dim - 1] == 1;
  const Tensor channels = dense ? x_ : torch::stable::contiguous(x_);
  if (!dense) x = View(channels);
  Tensor y = empty(x.sizes, x.dim, x.dtype);
  call.batch = batch;
  call.tokens = several ? x.sizes[1] : 1;
  call.dim = dim;
  call.width = weight.sizes[1];
  call.state_len = state.sizes[2];
  call.silu = silu;
  call.x = {x.data, x.strides[0], several ? x.strides[1] : 0};
  call.y = {y.mutable_data_ptr(), call.tokens * dim, several ? dim : 0};
  call.state = {conv_state.mutable_data_ptr(), state.strides[0], state.strides[1], state.strides[2]};
  call.slots = slots.data();
  call.weight = weight.data;
  call.weight_channel = weight.strides[0];
  call.weight_tap = weight.strides[1];
  call.bias = bias.data;
  call.bias_channel = bias_ ? bias.strides[0] : 0;
  causal_conv1d_step(call);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&forward));
  m.impl("causal_conv1d_fwd", TORCH_BOX(&forward));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&backward));
  m.impl("causal_conv1d_2d", TORCH_BOX(&forward_2d));
  m.impl("causal_conv1d_2d_fwd", TORCH_BOX(&forward_2d));
  m.impl("causal_conv1d_2d_bwd", TORCH_BOX(&backward_2d));
  m.impl("causal_conv1d_update", TORCH_BOX(&update));
}

}  // namespace mmkernels
