// The convolution's kernels without torch (alone.h): every storage type, widths with and without code of their own, runs
// that end inside and at a piece, padding, both directions, and the step with states of every dtype.
#include "alone.h"
#include "cpu/causal_conv1d.h"

namespace {

constexpr int64_t kRow = 75, kTokens = 2 * kRow;

// A row of the batch as a run of `first` tokens that continues states, padding, and a run up to the end.
std::vector<ConvPiece> pieces(int64_t first, int64_t padding, int64_t step) {
  std::vector<ConvPiece> list;
  for (int64_t row = 0; row < 2; ++row) {
    const auto add = [&](int64_t begin, int64_t end, int64_t initial, int64_t final, bool nothing) {
      const int64_t origin = step > 0 ? begin : kRow - 1 - begin;
      for (int64_t at = 0; at < end - begin; at += kConvPieceTokens) {
        const int64_t stop = at + kConvPieceTokens < end - begin ? at + kConvPieceTokens : end - begin;
        list.push_back({row, origin, end - begin, at, stop, initial, final, nothing});
      }
    };
    const bool whole = first == kRow;
    add(0, first, row, whole ? row : -1, false);
    add(first, first + padding, -1, -1, true);
    if (!whole) add(first + padding, kRow, -1, row, false);
  }
  return list;
}

void convolution(Storage storage, int64_t dim, int64_t width, int64_t first, int64_t padding, int64_t step,
                 bool ordered = false) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t history = width - 1, states = 2 * dim * history;
  const auto x = values(storage, kTokens * dim), grad = values(storage, kTokens * dim);
  const auto taps = values(wide, width * dim), bias = values(wide, dim);
  const auto initial = values(storage, states), grad_final = values(storage, states);
  auto y = unwritten(storage, kTokens * dim), grad_x = y;
  auto final = unwritten(storage, states), grad_initial = final;
  const auto list = pieces(first, padding, step);
  CausalConv1dForward f;
  f.storage = storage;
  f.dim = dim;
  f.width = width;
  f.step = step;
  std::vector<int64_t> order(kRow);  // every token once, neighbours apart
  for (int64_t p = 0; p < kRow; ++p) order[p] = p % 2 == 0 ? kRow - 1 - p / 2 : p / 2;
  if (ordered) f.order = order.data();
  f.pieces = list.data();
  f.piece_count = static_cast<int64_t>(list.size());
  f.silu = true;
  f.x = {x.data(), kRow * dim, dim};
  f.taps = taps.data();
  f.bias = bias.data();
  f.initial = {initial.data(), dim * history, history, 1};
  f.y = {y.data(), kRow * dim, dim};
  f.final = {final.data(), dim * history, history, 1};
  causal_conv1d_fwd(f);
  require_numbers("y", storage, y);
  require_numbers("final", storage, final);

  CausalConv1dBackward b;
  static_cast<CausalConv1d&>(b) = f;
  b.grad_y = {grad.data(), kRow * dim, dim};
  b.grad_final = {grad_final.data(), dim * history, history, 1};
  b.grad_x = {grad_x.data(), kRow * dim, dim};
  b.grad_initial = {grad_initial.data(), dim * history, history, 1};
  b.blocks = causal_conv1d_blocks(b.piece_count);
  auto sums = unwritten(wide, b.blocks * (width + 1) * dim);
  b.sums = sums.data();
  causal_conv1d_bwd(b);
  require_numbers("grad_x", storage, grad_x);
  require_numbers("grad_initial", storage, grad_initial);
  require_numbers("sums", wide, sums);
}

void step(Storage storage, Storage state_storage, int64_t dim, int64_t width, int64_t tokens, int64_t state_len) {
  const auto x = values(storage, 2 * tokens * dim), weight = values(storage, dim * width), bias = values(storage, dim);
  auto y = unwritten(storage, 2 * tokens * dim), state = values(state_storage, dim * state_len);
  const int64_t slots[2] = {-1, 0};
  CausalConv1dUpdate u;
  u.storage = u.weight_storage = u.bias_storage = storage;
  u.state_storage = state_storage;
  u.batch = 2;
  u.tokens = tokens;
  u.dim = dim;
  u.width = width;
  u.state_len = state_len;
  u.silu = true;
  u.x = {x.data(), tokens * dim, dim};
  u.y = {y.data(), tokens * dim, dim};
  u.state = {state.data(), dim * state_len, state_len, 1};
  u.slots = slots;
  u.weight = weight.data();
  u.weight_channel = width;
  u.weight_tap = 1;
  u.bias = bias.data();
  u.bias_channel = 1;
  causal_conv1d_step(u);
  require_numbers("y of a step", storage, y);
  require_numbers("state", state_storage, state);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int64_t width : {1, 2, 3, 4, 7}) {
      for (int64_t dim : {1, 37, 300}) {
        convolution(storage, dim, width, kRow, 0, 1);
        if (dim != 300) convolution(storage, dim, width, kRow, 0, 1, true);
        convolution(storage, dim, width, 2, 5, 1);
        convolution(storage, dim, width, 66, 1, -1);
        for (Storage states : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
          if ((states == Storage::f64) != (storage == Storage::f64)) continue;
          step(storage, states, dim, width, 1, width - 1);
          step(storage, states, dim, width, 3, width + 1);
        }
      }
    }
  }
  std::puts("ok");
  return 0;
}
