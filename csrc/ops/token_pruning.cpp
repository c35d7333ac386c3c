// The torch side of token pruning: checks, outputs, workspace, and the calls of csrc/cpu/token_pruning_*.cpp.
#include "cpu/token_pruning.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/integers.h"
#include "common/tensor.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensor itself where its last dimension is dense, else a copy.
Tensor dense_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadsIn heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor scores(const Tensor& q_, const Tensor& k_, const MaybeTensor& lse, double scale, int64_t num_prefix,
              double weight) {
  STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4, "cls_attention_scores: q and k must have four dimensions");
  STD_TORCH_CHECK(q_.scalar_type() == k_.scalar_type(), "cls_attention_scores: q and k must have one dtype");
  const Tensor q = dense_last(q_), k = dense_last(k_);
  ClsAttentionScores call;
  call.storage = storage_of(q, "q");
  const ScalarType arithmetic = arithmetic_of(call.storage);
  call.batch = q.size(0), call.rows = q.size(1), call.heads = q.size(2), call.headdim = q.size(3);
  call.keys = k.size(1), call.kv_heads = k.size(2);
  STD_TORCH_CHECK(k.size(0) == call.batch && k.size(3) == call.headdim && call.rows > 0 && call.kv_heads > 0 &&
                      call.heads % call.kv_heads == 0 && call.heads > 0,
                  "cls_attention_scores: q and k do not fit together");
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= call.keys, "cls_attention_scores: num_prefix exceeds the keys");
  call.num_prefix = num_prefix;
  call.scale = scale;
  call.weight = weight;
  call.q = heads_of(q);
  call.k = heads_of(k);
  MaybeTensor dense_lse;
  if (lse) {
    STD_TORCH_CHECK((sizes_of(*lse) == std::vector<int64_t>{call.batch, call.heads, call.rows}),
                    "cls_attention_scores: lse must be (batch, heads, rows)");
    dense_lse = parameter_of(*lse, arithmetic);
  }
  call.lse = lse ? dense_lse->const_data_ptr() : nullptr;
  Tensor logits = empty({call.batch, call.heads, call.rows, call.keys}, arithmetic);
  Tensor made = empty({call.batch, call.keys - num_prefix}, arithmetic);
  call.logits = logits.mutable_data_ptr();
  call.scores = made.mutable_data_ptr();
  cls_attention_scores(call);
  return made;
}

// A dense mask of the given shape; null where there is none.
const uint8_t* mask_of(const MaybeTensor& mask, int64_t rows, int64_t columns, const char* name, MaybeTensor& owner) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == rows && mask->size(1) == columns &&
                      mask->scalar_type() == ScalarType::Bool,
                  "attention_column_scores: ", name, " has another shape or is not bool");
  owner = torch::stable::contiguous(*mask);
  return static_cast<const uint8_t*>(owner->const_data_ptr());
}

Tensor column_scores(const Tensor& q_, const Tensor& k_, const MaybeTensor& lse, double scale, int64_t num_prefix,
                     const MaybeTensor& query_mask, const MaybeTensor& key_mask, bool causal) {
  STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4, "attention_column_scores: q and k must have four dimensions");
  STD_TORCH_CHECK(q_.scalar_type() == k_.scalar_type(), "attention_column_scores: q and k must have one dtype");
  const Tensor q = dense_last(q_), k = dense_last(k_);
  AttentionColumns call;
  call.storage = storage_of(q, "q");
  const ScalarType arithmetic = arithmetic_of(call.storage);
  call.batch = q.size(0), call.rows = q.size(1), call.heads = q.size(2), call.headdim = q.size(3);
  call.keys = k.size(1), call.kv_heads = k.size(2);
  STD_TORCH_CHECK(k.size(0) == call.batch && k.size(3) == call.headdim && call.kv_heads > 0 && call.heads > 0 &&
                      call.heads % call.kv_heads == 0,
                  "attention_column_scores: q and k do not fit together");
  STD_TORCH_CHECK(0 <= num_prefix && num_prefix <= call.keys, "attention_column_scores: num_prefix exceeds the keys");
  call.num_prefix = num_prefix;
  call.causal = causal;
  call.scale = scale;
  call.q = heads_of(q);
  call.k = heads_of(k);
  MaybeTensor dense_lse, rows_owner, keys_owner;
  if (lse) {
    STD_TORCH_CHECK((sizes_of(*lse) == std::vector<int64_t>{call.batch, call.heads, call.rows}),
                    "attention_column_scores: lse must be (batch, heads, rows)");
    dense_lse = parameter_of(*lse, arithmetic);
  }
  call.lse = lse ? dense_lse->const_data_ptr() : nullptr;
  call.query_mask = mask_of(query_mask, call.batch, call.rows, "query_mask", rows_owner);
  call.key_mask = mask_of(key_mask, call.batch, call.keys, "key_mask", keys_owner);
  Tensor sums = empty({call.batch, call.heads, call.keys}, arithmetic);
  Tensor made = empty({call.batch, call.keys - num_prefix}, arithmetic);
  call.sums = sums.mutable_data_ptr();
  call.scores = made.mutable_data_ptr();
  attention_column_scores(call);
  return made;
}

// How many tokens the samples before each keep.
std::vector<int64_t> starts_of(const MaybeTensor& counts, int64_t batch, int64_t width) {
  std::vector<int64_t> starts(static_cast<size_t>(batch) + 1, 0);
  std::vector<int64_t> given;
  if (counts) {
    STD_TORCH_CHECK(counts->dim() == 1 && counts->size(0) == batch, "prune_tokens: counts must be (batch,)");
    given = integers_of(*counts);
  }
  for (size_t b = 0; b < static_cast<size_t>(batch); ++b) {
    const int64_t count = counts ? given[b] : width;
    STD_TORCH_CHECK(0 <= count && count <= width, "prune_tokens: a count must be in 0 .. width");
    starts[b + 1] = starts[b] + count;
  }
  return starts;
}

Tensor int32_of(const std::vector<int64_t>& values) {
  Tensor made = empty({static_cast<int64_t>(values.size())}, ScalarType::Int);
  int32_t* to = static_cast<int32_t*>(made.mutable_data_ptr());
  for (const int64_t value : values) *to++ = static_cast<int32_t>(value);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prune(const Tensor& features_, const Tensor& scores_,
                                                         const MaybeTensor& mask, const MaybeTensor& position_ids,
                                                         const MaybeTensor& counts, int64_t width, int64_t total) {
  STD_TORCH_CHECK(features_.dim() == 3, "prune_tokens: features must be (batch, tokens, dim)");
  const int64_t batch = features_.size(0), tokens = features_.size(1), dim = features_.size(2);
  const auto check = [&](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == batch && tensor.size(1) == tokens, "prune_tokens: ", name,
                    " must be (batch, tokens)");
  };
  check(scores_, "scores");
  const bool wide = storage_of(scores_, "scores") == Storage::f64;
  const Tensor features = dense_last(features_);
  const Tensor scores = parameter_of(scores_, wide ? ScalarType::Double : ScalarType::Float);
  const std::vector<int64_t> starts = starts_of(counts, batch, width);
  STD_TORCH_CHECK(total < 0 || total == starts.back(), "prune_tokens: total must be the sum of the counts");
  MaybeTensor dense_mask, dense_positions;
  if (mask) {
    check(*mask, "mask");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "prune_tokens: mask must be bool");
    dense_mask = torch::stable::contiguous(*mask);
  }
  if (position_ids) {
    check(*position_ids, "position_ids");
    dense_positions = torch::stable::contiguous(*position_ids);
  }

  const auto shape = [&](bool rows) {
    std::vector<int64_t> sizes = total < 0 ? std::vector<int64_t>{batch, width} : std::vector<int64_t>{total};
    if (rows) sizes.push_back(dim);
    return sizes;
  };
  Tensor kept = empty(shape(true), features.scalar_type());
  Tensor indices = empty(shape(false), ScalarType::Long);
  Tensor positions = empty(shape(false), position_ids ? position_ids->scalar_type() : ScalarType::Long);
  Tensor kept_mask = empty(shape(false), ScalarType::Bool);

  PruneTokens call;
  const int64_t element = features.element_size();
  call.batch = batch;
  call.tokens = tokens;
  call.width = width;
  call.packed = total >= 0;
  call.wide_scores = wide;
  call.scores = scores.const_data_ptr();
  call.mask = mask ? static_cast<const uint8_t*>(dense_mask->const_data_ptr()) : nullptr;
  call.starts = starts.data();
  call.features = static_cast<const char*>(features.const_data_ptr());
  call.batch_stride = features.stride(0) * element;
  call.row_stride = features.stride(1) * element;
  call.row_bytes = dim * element;
  call.position_ids = position_ids ? static_cast<const char*>(dense_positions->const_data_ptr()) : nullptr;
  call.position_bytes = positions.element_size();
  call.kept_features = static_cast<char*>(kept.mutable_data_ptr());
  call.keep_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  call.kept_positions = static_cast<char*>(positions.mutable_data_ptr());
  call.kept_mask = static_cast<uint8_t*>(kept_mask.mutable_data_ptr());
  prune_tokens(call);
  return {kept, indices, positions, kept_mask, int32_of(starts)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cls_attention_scores", TORCH_BOX(&scores));
  m.impl("cls_attention_scores_fwd", TORCH_BOX(&scores));
  m.impl("attention_column_scores", TORCH_BOX(&column_scores));
  m.impl("attention_column_scores_fwd", TORCH_BOX(&column_scores));
  m.impl("prune_tokens", TORCH_BOX(&prune));
  m.impl("prune_tokens_fwd", TORCH_BOX(&prune));
}

}  // namespace mmkernels
