// Attention over intervals and rectangles of keys: what the kernels read and write.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// A tensor (batch, tokens, heads, headdim) read through its strides, in elements; the last dimension is dense.
struct AttentionIn {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// Rows q0 .. q1-1 of one element of the batch also attend keys k0 .. k1-1.
struct AttentionRect {
  int32_t batch, q0, q1, k0, k1;
};

// What one thread does alone: of each of kv_heads heads of keys from kv_head on, query rows begin .. begin + rows of
// the heads that share it, counted head after head; and keys first_key .. last_key.
struct AttentionTask {
  int64_t batch, kv_head, kv_heads, begin, rows, split, first_key, last_key;
};

// Tensors marked [A] are in the arithmetic type of `storage`, the others in `storage`.
struct Attention {
  Storage storage;
  int64_t batch, qlen, klen, heads, kv_heads, headdim;
  AttentionIn q, k, v;
  // Row i of batch b attends keys row_start .. row_end-1 at b * qlen + i, and what the rectangles add.
  const int32_t *row_start, *row_end;
  const AttentionRect* rects;   // sorted by batch
  const int64_t* rects_before;  // (batch + 1): where those of each element begin
  double scale;
  // Share s has the tasks share[s] .. share[s + 1].  No result depends on how they are shared.
  const AttentionTask* task;
  const int64_t* share;
  int64_t shares;
  int64_t most_rows;  // of any task
};

// With `splits` > 1 tasks see some of the keys, and what they find waits to be joined in `parts` [A], (splits, batch,
// heads, qlen, headdim), and part_lse [A], (splits, batch, heads, qlen), base 2.
struct AttentionForward : Attention {
  void* out;  // (batch, qlen, heads, headdim), dense
  void* lse;  // [A] (batch, heads, qlen), dense
  int64_t splits;
  void *parts, *part_lse;
};

// mass[b][h][j] = sum over i of weights[b][i] P[b][h][i][j].  Tasks cover the keys, each with all query rows.
struct AttentionMass : Attention {
  const void* lse;      // [A] as forward wrote it
  const void* weights;  // [A] (batch, qlen), dense
  void* mass;           // [A] (batch, heads, klen), dense
};

// Tasks are heads of keys, each with all its queries and keys.
struct AttentionBackward : Attention {
  AttentionIn grad_out, out;       // grad_out.data null: zeros
  const void* lse;                 // [A] as forward wrote it
  const void* grad_lse;            // [A] like lse, or null: zeros
  void *grad_q, *grad_k, *grad_v;  // dense
};

MMK_KERNEL_BF16(mma_attention_fwd, AttentionForward)
MMK_KERNEL(mma_attention_few, AttentionForward)
MMK_KERNEL(mma_attention_join, AttentionForward)
MMK_KERNEL(mma_attention_mass, AttentionMass)
MMK_KERNEL(mma_attention_bwd, AttentionBackward)

}  // namespace mmkernels
