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

// Which tokens are alike: a token at an even place is linked to that at an odd place of the largest cosine.
struct BipartiteMatching {
  Storage storage;  // of metric
  int64_t batch, tokens, dim;
  int64_t merged;   // links that are made, at most half of the tokens behind the protected ones
  int64_t protect;  // leading tokens that are in neither set
  bool sets;        // what remains is listed with even places first
  const void* metric;  // rows of dim dense elements
  int64_t batch_stride, row_stride;
  // Workspace of the arithmetic type: unit vectors of even places (batch, even places, dim); those of odd ones (batch,
  // dim, odd places rounded up to kMatchingColumns); of each even place the best cosine, and whose it is.
  void *even, *odd, *cosine;
  int64_t* link;
  // Outputs, dense; similarity of the arithmetic type.
  int64_t *keep_indices, *assignment, *source;  // (batch, tokens - merged), (batch, tokens), (batch, merged)
  void* similarity;                             // (batch, merged)
};
inline constexpr int64_t kMatchingColumns = 64;  // a multiple of every level's tile

// A plan of merging: what remains, where each token ends up, and what is merged, all of them in range and dense.
struct MergePlan {
  int64_t batch, tokens, width, merged;
  const int64_t *keep_indices, *assignment, *source;  // (batch, width), (batch, tokens), (batch, merged)
};

struct MergeTokens {
  Storage storage;  // of x and out; sizes and totals are of the arithmetic type and dense
  MergePlan plan;
  int64_t dim;
  const void* x;
  int64_t batch_stride, row_stride;
  const void* sizes;  // (batch, tokens); null: 1
  int64_t *first, *next;  // workspace, (batch, width) and (batch, merged): what is merged into each slot
  void* out;              // (batch, width, dim), dense
  void* totals;           // (batch, width)
};

struct MergeTokensGradient {
  Storage storage;
  MergePlan plan;
  int64_t dim;
  const void* grad_out;     // (batch, width, dim), dense
  const void* grad_totals;  // (batch, width) of the arithmetic type, dense
  const void* x;
  int64_t batch_stride, row_stride;
  const void* sizes;   // as above; null: no gradient of sizes either
  const void* totals;  // as above
  void *products, *pull;  // workspace of the arithmetic type, (batch, merged) and (batch, width)
  void* grad_x;           // (batch, tokens, dim), dense
  void* grad_sizes;       // (batch, tokens) of the arithmetic type, dense; unused without sizes
};

MMK_KERNEL(bipartite_soft_matching, BipartiteMatching)
MMK_KERNEL(merge_tokens, MergeTokens)
MMK_KERNEL(merge_tokens_bwd, MergeTokensGradient)
MMK_KERNEL(cls_attention_scores, ClsAttentionScores)
MMK_KERNEL(attention_column_scores, AttentionColumns)
MMK_KERNEL(prune_tokens, PruneTokens)

}  // namespace mmkernels
