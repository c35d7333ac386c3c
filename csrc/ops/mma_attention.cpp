// The torch side of attention: checks, the cut into tasks, outputs, and the calls of csrc/cpu/mma_attention_*.cpp.
#include "cpu/mma_attention.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "cpu/mma_attention_plan.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// At most so many query rows of all heads that share keys are `few`: dot products then beat register tiles.
constexpr int64_t kFewRows = 16;
// Rows of a task: several tiles, so that packing keys costs little, but no more sums than stay in cache beside the keys;
// and so many tasks that threads are kept busy.
constexpr int64_t kTile = 96, kMostRows = 5 * kTile, kFewestRows = 2 * kTile, kTasks = 32;
// Keys of a stretch, when rows alone give too few tasks: longer than what joining the stretches costs.
constexpr int64_t kSplitKeys = 1024, kFewSplitKeys = 256, kMassKeys = 512;
// Multiply-adds (about 100 us) below which waking a thread costs more than it saves.
constexpr double kWorthThreads = 4e6;

// A tensor whose last dimension is dense: itself, or a copy where it is not.
Tensor dense_last(const Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

AttentionIn in_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_shape(const Tensor& tensor, std::vector<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(sizes_of(tensor) == sizes, "mma_attention: ", name, " has the wrong shape");
}

void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "mma_attention: ", name, " has the wrong dtype");
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tensors of a call in the form kernels read; owns what had to be converted.
struct Inputs {
  ScalarType storage_type, arithmetic;
  int64_t batch, qlen, heads, headdim, klen, kv_heads;
  Tensor q, k, v, row_start, row_end;
  std::vector<AttentionRect> rects;
  std::vector<int64_t> rects_before;
  double scale;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& start, const Tensor& end,
         const Tensor& rects_, double scale_)
      : storage_type(q_.scalar_type()), arithmetic(arithmetic_of(storage_of(q_, "q"))), q(q_), k(k_), v(v_),
        row_start(torch::stable::contiguous(start)), row_end(torch::stable::contiguous(end)), scale(scale_) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "mma_attention: q and k must have 4 dimensions");
    batch = q.size(0), qlen = q.size(1), heads = q.size(2), headdim = q.size(3), klen = k.size(1), kv_heads = k.size(2);
    STD_TORCH_CHECK(headdim > 0, "mma_attention: headdim must be positive");
    STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "mma_attention: nkvheads must divide nheads");
    check_shape(k, {batch, klen, kv_heads, headdim}, "k"), check_shape(v, sizes_of(k), "v");
    check_shape(row_start, {batch, qlen}, "row_start"), check_shape(row_end, {batch, qlen}, "row_end");
    check_dtype(k, storage_type, "k"), check_dtype(v, storage_type, "v");
    check_dtype(row_start, ScalarType::Int, "row_start"), check_dtype(row_end, ScalarType::Int, "row_end");
    q = dense_last(q), k = dense_last(k), v = dense_last(v);
    sort_rects(rects_);
  }

  // By batch; those that are empty or of no row of the batch are dropped.
  void sort_rects(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == 5, "mma_attention: rects must be (nrects, 5)");
    check_dtype(tensor, ScalarType::Int, "rects");
    const Tensor dense = torch::stable::contiguous(tensor);
    const int32_t* data = static_cast<const int32_t*>(dense.const_data_ptr());
    for (int64_t n = 0; n < dense.size(0); ++n, data += 5) {
      const bool live = 0 <= data[0] && data[0] < batch && data[1] < data[2] && data[3] < data[4];
      if (live) rects.push_back({data[0], data[1], data[2], data[3], data[4]});
    }
    const auto earlier = [](const AttentionRect& a, const AttentionRect& b) { return a.batch < b.batch; };
    std::stable_sort(rects.begin(), rects.end(), earlier);
    rects_before.assign(static_cast<size_t>(batch) + 1, 0);
    for (const AttentionRect& rect : rects) ++rects_before[static_cast<size_t>(rect.batch) + 1];
    for (size_t b = 0; b < static_cast<size_t>(batch); ++b) rects_before[b + 1] += rects_before[b];
  }

  int64_t group_rows() const { return heads / kv_heads * qlen; }
  bool few() const { return group_rows() <= kFewRows; }
  std::vector<int64_t> out_sizes() const { return {batch, qlen, heads, headdim}; }

  void fill(Attention& call) const {
    call.storage = storage_of(q, "q");
    call.batch = batch, call.qlen = qlen, call.klen = klen, call.heads = heads, call.kv_heads = kv_heads;
    call.headdim = headdim;
    call.q = in_of(q), call.k = in_of(k), call.v = in_of(v);
    call.row_start = static_cast<const int32_t*>(row_start.const_data_ptr());
    call.row_end = static_cast<const int32_t*>(row_end.const_data_ptr());
    call.rects = rects.data(), call.rects_before = rects_before.data();
    call.scale = scale;
  }

  // Threads worth waking.
  int64_t shares() const {
    const double keys = static_cast<double>(batch * heads) * static_cast<double>(qlen * klen);
    return keys * static_cast<double>(headdim) < kWorthThreads ? 1 : torch::stable::get_num_threads();
  }
};

// How the forward is cut.  By sizes alone: stretches of keys are rounded one by one.
struct Cut {
  int64_t chunk_rows, kv_heads = 1, splits = 1, split_keys;

  explicit Cut(const Inputs& in) : split_keys(in.klen) {
    const int64_t rows = in.group_rows();
    if (in.few()) {
      chunk_rows = rows;
      // Heads side by side in memory are walked together, so that it is read from front to back.
      if (in.k.stride(2) < in.k.stride(1)) kv_heads = in.kv_heads;
      split(in, in.batch * ceil_div(in.kv_heads, kv_heads), kFewSplitKeys);
      return;
    }
    const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(1, in.batch * in.kv_heads));
    const int64_t chunks = std::max(ceil_div(rows, kMostRows), std::min(wanted, ceil_div(rows, kFewestRows)));
    chunk_rows = ceil_div(ceil_div(rows, chunks), kTile) * kTile;
    split(in, in.batch * in.kv_heads * ceil_div(rows, chunk_rows), kSplitKeys);
  }

  void split(const Inputs& in, int64_t tasks, int64_t least_keys) {
    splits = std::max<int64_t>(1, std::min(ceil_div(kTasks, std::max<int64_t>(1, tasks)), in.klen / least_keys));
    split_keys = ceil_div(ceil_div(in.klen, splits), 64) * 64;
    splits = std::max<int64_t>(1, ceil_div(in.klen, std::max<int64_t>(1, split_keys)));
  }
};

void run_forward(const Inputs& in, Tensor& out, Tensor& lse) {
  if (out.numel() == 0) return;
  AttentionForward call{};
  in.fill(call);
  const Cut cut(in);
  const AttentionPlan plan(call, cut.chunk_rows, cut.kv_heads, cut.splits, cut.split_keys, in.shares());
  plan.fill(call);
  call.out = out.mutable_data_ptr(), call.lse = lse.mutable_data_ptr();
  call.splits = cut.splits;
  Tensor parts = empty({cut.splits > 1 ? cut.splits * out.numel() : 0}, in.arithmetic);
  Tensor part_lse = empty({cut.splits > 1 ? cut.splits * lse.numel() : 0}, in.arithmetic);
  call.parts = parts.mutable_data_ptr(), call.part_lse = part_lse.mutable_data_ptr();
  in.few() ? mma_attention_few(call) : mma_attention_fwd(call);
  if (cut.splits > 1) mma_attention_join(call);
}

void run_mass(const Inputs& in, const Tensor& weights, const Tensor& lse, Tensor& mass) {
  check_shape(weights, {in.batch, in.qlen}, "mass_weights");
  check_dtype(weights, in.arithmetic, "mass_weights");
  if (mass.numel() == 0) return;
  AttentionMass call{};
  in.fill(call);
  const int64_t rows = std::max<int64_t>(1, in.group_rows());
  const AttentionPlan plan(call, rows, 1, ceil_div(in.klen, kMassKeys), kMassKeys, in.shares());
  plan.fill(call);
  const Tensor dense = torch::stable::contiguous(weights);
  call.weights = dense.const_data_ptr(), call.lse = lse.const_data_ptr(), call.mass = mass.mutable_data_ptr();
  mma_attention_mass(call);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& row_start,
                                           const Tensor& row_end, const Tensor& rects, const MaybeTensor& mass_weights,
                                           double scale) {
  const Inputs in(q, k, v, row_start, row_end, rects, scale);
  Tensor out = empty(in.out_sizes(), in.storage_type), lse = empty({in.batch, in.heads, in.qlen}, in.arithmetic);
  const std::vector<int64_t> by_key{in.batch, in.heads, in.klen};
  Tensor mass = empty(mass_weights ? by_key : std::vector<int64_t>{0}, in.arithmetic);
  run_forward(in, out, lse);
  if (mass_weights) run_mass(in, *mass_weights, lse, mass);
  return {out, lse, mass};
}

std::tuple<Tensor, Tensor, Tensor> backward(const MaybeTensor& grad_out, const MaybeTensor& grad_lse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& row_start,
                                            const Tensor& row_end, const Tensor& rects, const Tensor& out,
                                            const Tensor& lse, double scale) {
  const Inputs in(q, k, v, row_start, row_end, rects, scale);
  Tensor grad_q = empty(in.out_sizes(), in.storage_type), grad_k = empty(sizes_of(k), in.storage_type);
  Tensor grad_v = empty(sizes_of(k), in.storage_type);
  check_shape(out, in.out_sizes(), "out"), check_dtype(out, in.storage_type, "out");
  check_shape(lse, {in.batch, in.heads, in.qlen}, "lse"), check_dtype(lse, in.arithmetic, "lse");
  AttentionBackward call{};
  in.fill(call);
  const Tensor dense_out = dense_last(out), dense_lse = torch::stable::contiguous(lse);
  MaybeTensor of_out, of_lse;
  if (grad_out) {
    check_same(*grad_out, in.q, "grad_out");
    of_out = dense_last(*grad_out), call.grad_out = in_of(*of_out);
  }
  if (grad_lse) {
    check_shape(*grad_lse, {in.batch, in.heads, in.qlen}, "grad_lse");
    check_dtype(*grad_lse, in.arithmetic, "grad_lse");
    of_lse = torch::stable::contiguous(*grad_lse), call.grad_lse = of_lse->const_data_ptr();
  }
  if (in.batch == 0 || in.heads == 0) return {grad_q, grad_k, grad_v};
  const AttentionPlan plan(call, std::max<int64_t>(1, in.group_rows()), 1, 1, in.klen, in.shares());
  plan.fill(call);
  call.out = in_of(dense_out), call.lse = dense_lse.const_data_ptr();
  call.grad_q = grad_q.mutable_data_ptr(), call.grad_k = grad_k.mutable_data_ptr();
  call.grad_v = grad_v.mutable_data_ptr();
  mma_attention_bwd(call);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("mma_attention", TORCH_BOX(&forward));
  m.impl("mma_attention_fwd", TORCH_BOX(&forward));
  m.impl("mma_attention_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
