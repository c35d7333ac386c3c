// Causal depthwise convolution: what the kernels read and write.  Free of torch.
//
// A run is an unbroken stretch of tokens that taps do not leave: a whole row of the batch, one packed sequence, or equal
// ids side by side.  Positions count its tokens in scan order (backwards in time with step -1); positions -1, -2, ... are
// the states before it, oldest state = position -(width - 1).  With an order, position p is token order[p].
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// (batch, token, channel) with dense channels; a stride is in elements and may be 0.
struct TokensIn {
  const void* data = nullptr;
  int64_t row = 0, token = 0;
};
struct TokensOut {
  void* data = nullptr;
  int64_t row = 0, token = 0;
};

// (row, channel, time) with any strides.
struct StatesIn {
  const void* data = nullptr;
  int64_t row = 0, channel = 0, time = 0;
};
struct StatesOut {
  void* data = nullptr;
  int64_t row = 0, channel = 0, time = 0;
};

// Positions [begin, end) of a run; the pieces of a call cover every token once.
struct ConvPiece {
  int64_t row;             // of the batch
  int64_t origin, length;  // the run: its position 0 as a token of that row, its number of tokens
  int64_t begin, end;
  int64_t initial, final;  // rows of the states before and after the run; -1: zeros before, not wanted after
  bool padding;            // nothing is read, zeros are written
};

inline constexpr int64_t kConvPieceTokens = 64;

struct CausalConv1d {
  Storage storage;
  int64_t dim, width, step;
  const int64_t* order = nullptr;
  const ConvPiece* pieces;
  int64_t piece_count;
  bool silu;
  TokensIn x;
  const void* taps;  // (width, dim) in the arithmetic type; the last row multiplies the current token
  const void* bias;  // (dim,) in the arithmetic type; null: none
  StatesIn initial;  // like x in type; data null: none
};

struct CausalConv1dForward : CausalConv1d {
  TokensOut y;
  StatesOut final;  // data null: not wanted
};

struct CausalConv1dBackward : CausalConv1d {
  TokensIn grad_y;
  StatesIn grad_final;     // data null: zero
  TokensOut grad_x;
  StatesOut grad_initial;  // rows that no run continues are not written; data null: not wanted
  // (blocks, width + 1, dim) partial sums in the arithmetic type, rows as in taps and then bias; null: not wanted.
  void* sums;
  int64_t blocks;
};

// The step of a decoder: rows of state hold the last inputs and are shifted in place.
struct CausalConv1dUpdate {
  Storage storage, state_storage;  // f64 only together
  Storage weight_storage, bias_storage;
  int64_t batch, tokens, dim, width, state_len;
  bool silu;
  TokensIn x;
  TokensOut y;
  StatesOut state;
  const int64_t* slots;  // of each row, negative: padding; null: row i has slot i
  const void* weight;    // (dim, width)
  int64_t weight_channel, weight_tap;
  const void* bias;      // null: none
  int64_t bias_channel;
};

// Blocks of pieces whose parameter gradients are summed apart: by the problem alone, never by the number of threads.
inline int64_t causal_conv1d_blocks(int64_t pieces) { return pieces < 1 ? 1 : pieces < 64 ? pieces : 64; }

MMK_KERNEL(causal_conv1d_fwd, CausalConv1dForward)
MMK_KERNEL(causal_conv1d_bwd, CausalConv1dBackward)
MMK_KERNEL(causal_conv1d_step, CausalConv1dUpdate)

}  // namespace mmkernels
