// The kernels of token pruning without torch (alone.h): storage types, odd sizes, strides, masks, packed and padded.
#include "alone.h"
#include "cpu/token_pruning.h"

namespace {

void scores(Storage storage, int64_t keys, int64_t headdim, int64_t rows, int64_t prefix, bool lse) {
  const int64_t batch = 2, heads = 4, kv_heads = 2;
  const Storage arithmetic = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const auto q = values(storage, batch * rows * heads * headdim), k = values(storage, batch * keys * kv_heads * headdim);
  const auto given = values(arithmetic, batch * heads * rows);
  auto logits = unwritten(arithmetic, batch * heads * rows * keys), made = unwritten(arithmetic, batch * (keys - prefix));
  ClsAttentionScores call;
  call.storage = storage;
  call.batch = batch, call.rows = rows, call.keys = keys;
  call.heads = heads, call.kv_heads = kv_heads, call.headdim = headdim;
  call.num_prefix = prefix;
  call.scale = 0.01, call.weight = 0.5;
  call.q = {q.data(), rows * heads * headdim, heads * headdim, headdim};
  call.k = {k.data(), keys * kv_heads * headdim, headdim, keys * headdim};  // heads before tokens
  call.lse = lse ? given.data() : nullptr;
  call.logits = logits.data();
  call.scores = made.data();
  cls_attention_scores(call);
  require_numbers("scores", arithmetic, made);
}

void columns(Storage storage, int64_t keys, int64_t headdim, int64_t rows, bool masked, bool causal, bool lse) {
  const int64_t batch = 2, heads = 4, kv_heads = 2;
  const Storage arithmetic = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const auto q = values(storage, batch * rows * heads * headdim), k = values(storage, batch * keys * kv_heads * headdim);
  const auto given = values(arithmetic, batch * heads * rows);
  auto sums = unwritten(arithmetic, batch * heads * keys), made = unwritten(arithmetic, batch * (keys - 1));
  std::vector<uint8_t> query_mask(batch * rows), key_mask(batch * keys);
  for (int64_t i = 0; i < batch * rows; ++i) query_mask[i] = i % 3 != 0;
  for (int64_t i = 0; i < batch * keys; ++i) key_mask[i] = i >= keys && i % 4 != 0;  // the first sample sees nothing
  AttentionColumns call;
  call.storage = storage;
  call.batch = batch, call.rows = rows, call.keys = keys;
  call.heads = heads, call.kv_heads = kv_heads, call.headdim = headdim;
  call.num_prefix = 1;
  call.causal = causal;
  call.scale = 0.01;
  call.q = {q.data(), rows * heads * headdim, heads * headdim, headdim};
  call.k = {k.data(), keys * kv_heads * headdim, headdim, keys * headdim};  // heads before tokens
  call.lse = lse ? given.data() : nullptr;
  call.query_mask = masked ? query_mask.data() : nullptr;
  call.key_mask = masked ? key_mask.data() : nullptr;
  call.sums = sums.data();
  call.scores = made.data();
  attention_column_scores(call);
  require_numbers("columns", arithmetic, made);
}

void prune(bool wide, bool packed, bool masked, int64_t tokens, int64_t dim) {
  const int64_t batch = 3, width = (tokens + 1) / 2;
  const auto given = values(wide ? Storage::f64 : Storage::f32, batch * tokens);
  const auto features = values(Storage::bf16, batch * tokens * dim);
  std::vector<uint8_t> mask(batch * tokens);
  for (int64_t i = 0; i < batch * tokens; ++i) mask[i] = i % 3 != 0;  // fewer than asked for: the rest is padding
  std::vector<int64_t> starts = {0, width, width + 1, width + 1 + width};
  const int64_t slots = packed ? starts[batch] : batch * width;
  auto kept = unwritten(Storage::bf16, slots * dim);
  std::vector<int64_t> indices(slots, -7), positions(slots, -7);
  std::vector<uint8_t> kept_mask(slots, 7);
  PruneTokens call;
  call.batch = batch, call.tokens = tokens, call.width = width;
  call.packed = packed, call.wide_scores = wide;
  call.scores = given.data();
  call.mask = masked ? mask.data() : nullptr;
  call.starts = starts.data();
  call.features = reinterpret_cast<const char*>(features.data());
  call.row_bytes = call.row_stride = 2 * dim, call.batch_stride = tokens * call.row_stride;
  call.position_ids = nullptr;
  call.position_bytes = 8;
  call.kept_features = reinterpret_cast<char*>(kept.data());
  call.keep_indices = indices.data();
  call.kept_positions = reinterpret_cast<char*>(positions.data());
  call.kept_mask = kept_mask.data();
  prune_tokens(call);
  require_numbers("kept", Storage::bf16, kept);
  for (int64_t i = 0; i < slots; ++i) {
    if (indices[i] < -1 || indices[i] >= tokens || positions[i] < 0 || positions[i] >= width || kept_mask[i] > 1) {
      std::printf("slot %d is wrong\n", static_cast<int>(i));
      std::exit(1);
    }
  }
}

void require_plan(const MergePlan& plan) {
  for (int64_t i = 0; i < plan.batch * plan.width; ++i) {
    if (plan.keep_indices[i] < 0 || plan.keep_indices[i] >= plan.tokens) std::puts("what remains is wrong"), std::exit(1);
  }
  for (int64_t i = 0; i < plan.batch * plan.tokens; ++i) {
    if (plan.assignment[i] < 0 || plan.assignment[i] >= plan.width) std::puts("a slot is wrong"), std::exit(1);
  }
  for (int64_t i = 0; i < plan.batch * plan.merged; ++i) {
    if (plan.source[i] < 0 || plan.source[i] >= plan.tokens) std::puts("what is merged is wrong"), std::exit(1);
  }
}

// Matches, merges by the plan, and takes the gradient.
void merge(Storage storage, int64_t tokens, int64_t dim, int64_t protect, int64_t r, bool sets, bool sized) {
  const int64_t batch = 2, width = tokens - r;
  const Storage arithmetic = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t rows = (tokens + 1) / 2 - (protect + 1) / 2, columns = tokens / 2 - protect / 2;
  const int64_t room = (columns + kMatchingColumns - 1) / kMatchingColumns * kMatchingColumns;
  const auto x = values(storage, batch * tokens * dim), sizes = values(arithmetic, batch * tokens);
  auto even = unwritten(arithmetic, batch * rows * dim), odd = unwritten(arithmetic, batch * dim * room);
  auto cosine = unwritten(arithmetic, batch * rows), similarity = unwritten(arithmetic, batch * r);
  std::vector<int64_t> link(batch * rows, -7), keep(batch * width, -7), assignment(batch * tokens, -7);
  std::vector<int64_t> source(batch * r, -7), first(batch * width, -7), next(batch * r, -7);
  BipartiteMatching match;
  match.storage = storage;
  match.batch = batch, match.tokens = tokens, match.dim = dim;
  match.merged = r, match.protect = protect, match.sets = sets;
  match.metric = x.data(), match.batch_stride = tokens * dim, match.row_stride = dim;
  match.even = even.data(), match.odd = odd.data(), match.cosine = cosine.data(), match.link = link.data();
  match.keep_indices = keep.data(), match.assignment = assignment.data(), match.source = source.data();
  match.similarity = similarity.data();
  bipartite_soft_matching(match);
  require_numbers("similarity", arithmetic, similarity);
  const MergePlan plan = {batch, tokens, width, r, keep.data(), assignment.data(), source.data()};
  require_plan(plan);

  auto out = unwritten(storage, batch * width * dim), totals = unwritten(arithmetic, batch * width);
  MergeTokens call;
  call.storage = storage, call.plan = plan, call.dim = dim;
  call.x = x.data(), call.batch_stride = tokens * dim, call.row_stride = dim;
  call.sizes = sized ? sizes.data() : nullptr;
  call.first = first.data(), call.next = next.data();
  call.out = out.data(), call.totals = totals.data();
  merge_tokens(call);
  require_numbers("merged tokens", storage, out);
  require_numbers("totals", arithmetic, totals);

  const auto grad_totals = values(arithmetic, batch * width);
  auto products = unwritten(arithmetic, batch * r), pull = unwritten(arithmetic, batch * width);
  auto grad_x = unwritten(storage, batch * tokens * dim), grad_sizes = unwritten(arithmetic, batch * tokens);
  MergeTokensGradient grad;
  grad.storage = storage, grad.plan = plan, grad.dim = dim;
  grad.grad_out = out.data(), grad.grad_totals = grad_totals.data();
  grad.x = x.data(), grad.batch_stride = tokens * dim, grad.row_stride = dim;
  grad.sizes = call.sizes, grad.totals = totals.data();
  grad.products = products.data(), grad.pull = pull.data();
  grad.grad_x = grad_x.data(), grad.grad_sizes = grad_sizes.data();
  merge_tokens_bwd(grad);
  require_numbers("gradient of tokens", storage, grad_x);
  if (sized) require_numbers("gradient of sizes", arithmetic, grad_sizes);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int64_t keys : {1, 5, 33, 70}) {
      for (int64_t headdim : {1, 7, 40}) {
        scores(storage, keys, headdim, 1, 1, false);
        scores(storage, keys, headdim, 3, 0, headdim == 7);
      }
    }
  }
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int i = 0; i < 8; ++i) {
      for (int64_t keys : {1, 5, 33}) columns(storage, keys, keys == 5 ? 7 : 40, keys + 3, i & 1, i & 2, i & 4);
      columns(storage, 17, 3, 50, i & 1, i & 2, i & 4);
    }
  }
  for (int i = 0; i < 8; ++i) {
    for (int64_t tokens : {1, 2, 37, 600}) prune(i & 1, i & 2, i & 4, tokens, tokens == 2 ? 0 : 5);
  }
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int64_t tokens : {2, 7, 70, 131}) {
      for (int64_t protect : {0, 1}) {
        const int64_t most = (tokens - protect) / 2;
        merge(storage, tokens, tokens == 7 ? 0 : 5, protect, most, protect == 1, true);
        merge(storage, tokens, 19, protect, most / 2, protect == 0, tokens == 70);
      }
    }
  }
  std::puts("ok");
  return 0;
}
