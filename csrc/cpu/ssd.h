// The state-space scan of Mamba-2: what the kernels read and write.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// Where the state that enters a chunk comes from.
enum class SsdEntry : int32_t { zero, carried, initial };

// A stretch of tokens of one sequence, in scan order: tokens token, token + direction, ...; with an order: of positions.
struct SsdChunk {
  int64_t token;
  int32_t length;
  SsdEntry entry;
  bool leaves;   // the state after it enters the next chunk, or it ends the row
  bool padding;  // tokens with a negative id: outputs and gradients are 0, and no state passes
};

// What has a state of its own: an element of the batch, or a sequence of a packed batch of 1.
struct SsdRow {
  int64_t batch;
  int64_t begin, end;  // its chunks, in scan order
};

// A tensor (batch, seqlen, heads, width) read through its strides, in elements; the last dimension is dense.
struct SsdIn {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// Tensors marked [A] are in the arithmetic type of `storage`, the others in `storage`.
struct Ssd {
  Storage storage;
  int64_t seqlen, heads, groups, headdim, dstate;
  int64_t rows, most_chunks, chunk_tokens;  // most_chunks of any row, most tokens of any chunk
  const SsdRow* row;
  const SsdChunk* chunk;
  int64_t direction;     // +1, or -1: reverse
  const int64_t* order = nullptr;  // the token at each position of the scan, direction then +1; null: positions are tokens
  int64_t batch_tokens;  // tokens between two elements of the batch in the outputs: seqlen, or more in a wider tensor
  int64_t head_blocks;  // tasks that share the heads of a group
  SsdIn x, B, C, z;     // z.data null: no gate
  SsdIn dt;             // [A], width 1
  const void *A, *D, *dt_bias;  // [A]; D and dt_bias may be null
  bool D_per_channel, softplus;
  double dt_low, dt_high;
  const void* initial;  // [A] (rows, heads, headdim, dstate), or null: zeros
};

// A causal convolution over the positions of a row that makes x out of what is stored there, channel by channel.
struct SsdConvolution {
  int64_t width = 0;           // 0: none, x is read as it is
  int64_t channels = 0;        // of a row of taps
  const void* taps = nullptr;  // [A] (width, channels), the last row multiplies the token itself; head h from h headdim on
  const void* bias = nullptr;  // [A] (channels,), or null
  bool silu = false;
};

struct SsdForward : Ssd {
  SsdConvolution conv;  // rows must be whole, with an order
  void* y;           // (batch, seqlen, heads, headdim), dense but for batch_tokens
  bool y_arithmetic;  // y is [A]
  void* final;       // [A] like initial, or null: not wanted
};

struct SsdBackward : Ssd {
  SsdIn grad_y;
  const void* grad_final;  // [A] like initial, or null: zeros
  const void* y;           // [A] before the gate, dense; null without z
  void *grad_x, *grad_z;   // like y
  void* grad_dt;           // [A] like y
  // (batch, seqlen, groups, dstate) in `storage`; with several head blocks [A], one such tensor a block: sum_blocks().
  void *grad_B, *grad_C;
  int64_t block_stride;  // elements between those
  void* grad_initial;    // [A] or null
  double *grad_A, *grad_dt_bias;  // (rows, heads): one sum a row
  double* grad_D;                 // (rows, heads, headdim), or null
};

// to[i] = sum over blocks, first to last, of from[block * count + i]; `from` in the arithmetic type of `storage`.
struct SsdBlockSum {
  Storage storage;
  int64_t blocks, count;
  const void* from;
  void* to;
};

MMK_KERNEL_BF16(ssd_fwd, SsdForward)
MMK_KERNEL_BF16(ssd_bwd, SsdBackward)
MMK_KERNEL_BF16(ssd_sum_blocks, SsdBlockSum)

}  // namespace mmkernels
