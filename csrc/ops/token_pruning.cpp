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

std::tuple<Tensor, Tensor, Tensor, Tensor> matching(const Tensor& metric_, int64_t r, int64_t protect, bool sets) {
  STD_TORCH_CHECK(metric_.dim() == 3, "bipartite_soft_matching: metric must be (batch, tokens, dim)");
  const Tensor metric = dense_last(metric_);
  BipartiteMatching call;
  call.storage = storage_of(metric, "metric");
  const ScalarType arithmetic = arithmetic_of(call.storage);
  call.batch = metric.size(0), call.tokens = metric.size(1), call.dim = metric.size(2);
  STD_TORCH_CHECK(0 <= protect && protect <= call.tokens && 0 <= r && r <= (call.tokens - protect) / 2,
                  "bipartite_soft_matching: r or protect is out of range");
  call.merged = r;
  call.protect = protect;
  call.sets = sets;
  call.metric = metric.const_data_ptr();
  call.batch_stride = metric.stride(0), call.row_stride = metric.stride(1);
  const int64_t rows = (call.tokens + 1) / 2 - (protect + 1) / 2, columns = call.tokens / 2 - protect / 2;
  const int64_t room = (columns + kMatchingColumns - 1) / kMatchingColumns * kMatchingColumns;
  const int64_t working = r > 0 ? call.batch : 0;
  Tensor even = empty({working, rows, call.dim}, arithmetic), odd = empty({working, call.dim, room}, arithmetic);
  Tensor cosine = empty({working, rows}, arithmetic), link = empty({working, rows}, ScalarType::Long);
  Tensor keep_indices = empty({call.batch, call.tokens - r}, ScalarType::Long);
  Tensor assignment = empty({call.batch, call.tokens}, ScalarType::Long);
  Tensor source = empty({call.batch, r}, ScalarType::Long);
  Tensor similarity = empty({call.batch, r}, arithmetic);
  call.even = even.mutable_data_ptr();
  call.odd = odd.mutable_data_ptr();
  call.cosine = cosine.mutable_data_ptr();
  call.link = static_cast<int64_t*>(link.mutable_data_ptr());
  call.keep_indices = static_cast<int64_t*>(keep_indices.mutable_data_ptr());
  call.assignment = static_cast<int64_t*>(assignment.mutable_data_ptr());
  call.source = static_cast<int64_t*>(source.mutable_data_ptr());
  call.similarity = similarity.mutable_data_ptr();
  bipartite_soft_matching(call);
  return {keep_indices, assignment, source, similarity};
}

// A plan's indices, dense and in range: a plan may come from anywhere, and kernels do not look where they are sent.
struct PlanTensors {
  Tensor keep_indices, assignment, source;
  MergePlan plan;

  static Tensor checked(const Tensor& tensor, int64_t batch, int64_t end, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == batch && tensor.scalar_type() == ScalarType::Long,
                    "merge_tokens: ", name, " must be a matrix of int64, one row a sample");
    Tensor dense = torch::stable::contiguous(tensor);
    const int64_t* values = static_cast<const int64_t*>(dense.const_data_ptr());
    for (int64_t i = 0; i < dense.numel(); ++i) {
      STD_TORCH_CHECK(0 <= values[i] && values[i] < end, "merge_tokens: ", name, " must be in 0 .. ", end - 1, "; got ",
                      values[i]);
    }
    return dense;
  }

  PlanTensors(const Tensor& x, const Tensor& keep_, const Tensor& assignment_, const Tensor& source_)
      : keep_indices(checked(keep_, x.size(0), x.size(1), "keep_indices")),
        assignment(checked(assignment_, x.size(0), keep_.size(1), "assignment")),
        source(checked(source_, x.size(0), x.size(1), "source")) {
    STD_TORCH_CHECK(assignment.size(1) == x.size(1), "merge_tokens: assignment must have one place a token");
    const auto data = [](const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); };
    plan = {x.size(0),          x.size(1),        keep_indices.size(1), source.size(1),
            data(keep_indices), data(assignment), data(source)};
  }
};

// Sizes of tokens, or whatever else a plan's tokens have one of, dense and in the arithmetic type.
MaybeTensor weights_of(const MaybeTensor& weights, int64_t batch, int64_t tokens, ScalarType arithmetic) {
  if (!weights) return std::nullopt;
  STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == batch && weights->size(1) == tokens,
                  "merge_tokens: sizes or totals have another shape");
  return parameter_of(*weights, arithmetic);
}

std::tuple<Tensor, Tensor> merging(const Tensor& x_, const Tensor& keep_indices, const Tensor& assignment,
                                   const Tensor& source, const MaybeTensor& sizes_) {
  STD_TORCH_CHECK(x_.dim() == 3, "merge_tokens: x must be (batch, tokens, dim)");
  const Tensor x = dense_last(x_);
  const PlanTensors tensors(x, keep_indices, assignment, source);
  MergeTokens call;
  call.storage = storage_of(x, "x");
  call.plan = tensors.plan;
  const ScalarType arithmetic = arithmetic_of(call.storage);
  const int64_t batch = call.plan.batch, width = call.plan.width;
  call.dim = x.size(2);
  call.x = x.const_data_ptr();
  call.batch_stride = x.stride(0), call.row_stride = x.stride(1);
  const MaybeTensor sizes = weights_of(sizes_, batch, call.plan.tokens, arithmetic);
  call.sizes = sizes ? sizes->const_data_ptr() : nullptr;
  Tensor first = empty({batch, width}, ScalarType::Long), next = empty({batch, call.plan.merged}, ScalarType::Long);
  Tensor out = empty({batch, width, call.dim}, x.scalar_type()), totals = empty({batch, width}, arithmetic);
  call.first = static_cast<int64_t*>(first.mutable_data_ptr());
  call.next = static_cast<int64_t*>(next.mutable_data_ptr());
  call.out = out.mutable_data_ptr();
  call.totals = totals.mutable_data_ptr();
  merge_tokens(call);
  return {out, totals};
}

std::tuple<Tensor, Tensor> merging_backward(const Tensor& grad_tokens, const Tensor& grad_totals_, const Tensor& x_,
                                            const Tensor& keep_indices, const Tensor& assignment, const Tensor& source,
                                            const MaybeTensor& sizes_, const Tensor& totals_) {
  const Tensor x = dense_last(x_), grad = torch::stable::contiguous(grad_tokens);
  const PlanTensors tensors(x, keep_indices, assignment, source);
  MergeTokensGradient call;
  call.storage = storage_of(x, "x");
  call.plan = tensors.plan;
  const ScalarType arithmetic = arithmetic_of(call.storage);
  const int64_t batch = call.plan.batch, tokens = call.plan.tokens, width = call.plan.width;
  call.dim = x.size(2);
  STD_TORCH_CHECK((sizes_of(grad) == std::vector<int64_t>{batch, width, call.dim}) &&
                      grad.scalar_type() == x.scalar_type(),
                  "merge_tokens: the gradient must be that of the merged tokens");
  const MaybeTensor sizes = weights_of(sizes_, batch, tokens, arithmetic);
  const MaybeTensor grad_totals = weights_of(grad_totals_, batch, width, arithmetic);
  const MaybeTensor totals = weights_of(totals_, batch, width, arithmetic);
  call.grad_out = grad.const_data_ptr();
  call.grad_totals = grad_totals->const_data_ptr();
  call.x = x.const_data_ptr();
  call.batch_stride = x.stride(0), call.row_stride = x.stride(1);
  call.sizes = sizes ? sizes->const_data_ptr() : nullptr;
  call.totals = totals->const_data_ptr();
  Tensor products = empty({batch, call.plan.merged}, arithmetic), pull = empty({batch, width}, arithmetic);
  Tensor grad_x = empty({batch, tokens, call.dim}, x.scalar_type());
  Tensor grad_sizes = empty(sizes ? std::vector<int64_t>{batch, tokens} : std::vector<int64_t>{0}, arithmetic);
  call.products = products.mutable_data_ptr();
  call.pull = pull.mutable_data_ptr();
  call.grad_x = grad_x.mutable_data_ptr();
  call.grad_sizes = grad_sizes.mutable_data_ptr();
  merge_tokens_bwd(call);
  return {grad_x, grad_sizes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("cls_attention_scores", TORCH_BOX(&scores));
  m.impl("cls_attention_scores_fwd", TORCH_BOX(&scores));
  m.impl("attention_column_scores", TORCH_BOX(&column_scores));
  m.impl("attention_column_scores_fwd", TORCH_BOX(&column_scores));
  m.impl("prune_tokens", TORCH_BOX(&prune));
  m.impl("prune_tokens_fwd", TORCH_BOX(&prune));
  m.impl("bipartite_soft_matching", TORCH_BOX(&matching));
  m.impl("bipartite_soft_matching_fwd", TORCH_BOX(&matching));
  m.impl("merge_tokens", TORCH_BOX(&merging));
  m.impl("merge_tokens_fwd", TORCH_BOX(&merging));
  m.impl("merge_tokens_bwd", TORCH_BOX(&merging_backward));
}

}  // namespace mmkernels
