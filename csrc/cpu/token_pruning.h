// Scores of visual tokens and the choice among them: what the kernels read and write.  Free of torch.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"

namespace mmkernels {

// Elements of a (batch, seqlen, heads, headdim) tensor whose last dimension is dense.
struct HeadsIn {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

struct ClsAttentionScores {
  Storage storage;  // of q and k
  int64_t batch, rows, keys, heads, kv_heads, headdim;  // query head h reads kv head h / (heads / kv_heads)
  int64_t num_prefix;  // leading keys that are in the softmax only
  double scale, weight;
  HeadsIn q, k;
  const void* lse;  // (batch, heads, rows) in the arithmetic type, dense; null: the softmax is made here
  void* logits;     // (batch, heads, rows, keys) of the arithmetic type: workspace
  void* scores;     // (batch, keys - num_prefix) in the arithmetic type, dense
};

struct AttentionColumns {
  Storage storage;  // of q and k
  int64_t batch, rows, keys, heads, kv_heads, headdim;
  int64_t num_prefix;  // leading keys that are in the softmax only
  bool causal;         // row r sees keys up to r + keys - rows
  double scale;
  HeadsIn q, k;
  const void* lse;            // (batch, heads, rows) in the arithmetic type, dense; null: the softmax is made here
  const uint8_t* query_mask;  // (batch, rows), dense; 0: the row does not count; null: all do
  const uint8_t* key_mask;    // (batch, keys), dense; 0: no row sees the key; null: all do
  void* sums;                 // (batch, heads, keys) of the arithmetic type: workspace
  void* scores;               // (batch, keys - num_prefix) in the arithmetic type, dense
};

struct PruneTokens {
  int64_t batch, tokens;
  int64_t width;            // of padded outputs
  bool packed;
  bool wide_scores;         // double, else float
  const void* scores;       // (batch, tokens), dense
  const uint8_t* mask;      // (batch, tokens), dense; 0: never kept; null: every token may be
  const int64_t* starts;    // (batch + 1): how many the samples before keep; keeps starts[b + 1] - starts[b]
  const char* features;     // rows of row_bytes; strides in bytes
  int64_t batch_stride, row_stride, row_bytes;
  const char* position_ids; // (batch, tokens), dense, of position_bytes each; null: the places in the pruned sequence
  int64_t position_bytes;
  // Outputs, dense: slot b * width + i, or starts[b] + i when packed.
  char* kept_features;
  int64_t* keep_indices;
  char* kept_positions;
  uint8_t* kept_mask;
};

MMK_KERNEL(cls_attention_scores, ClsAttentionScores)
MMK_KERNEL(attention_column_scores, AttentionColumns)
MMK_KERNEL(prune_tokens, PruneTokens)

}  // namespace mmkernels
