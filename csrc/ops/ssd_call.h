// A call of the state-space scan in the form kernels read: what the op and its two-dimensional form share.
#pragma once

#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "common/tensor.h"
#include "cpu/ssd.h"
#include "cpu/ssd_plan.h"

namespace mmkernels::ssd_call {

using MaybeTensor = std::optional<Tensor>;

// A tensor whose last dimension is dense: itself, or a copy where it is not.
inline Tensor dense_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline SsdIn in_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline void check_shape(const Tensor& tensor, std::vector<int64_t> sizes, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  STD_TORCH_CHECK(same, "ssd_scan: ", name, " has the wrong shape");
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "ssd_scan: ", name, " has the wrong dtype");
}

// Integers on the CPU, dense, as int64.
inline Tensor integers(const Tensor& tensor) {
  return torch::stable::contiguous(
      tensor.scalar_type() == ScalarType::Long ? tensor : torch::stable::to(tensor, ScalarType::Long));
}

// States that a task keeps in L2 at once: half of it, as a chunk's pieces lie there too; 256 KiB where nobody tells.
inline int64_t states_at_once() {
  constexpr int64_t least = 262144;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t half = static_cast<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE)) / 2;
  return half > least ? half : least;
#else
  return least;
#endif
}

struct Options {
  bool softplus;
  double low, high;
  int64_t chunk_size;
  bool reverse;
};

// The tensors of a call in the form kernels read; owns what had to be converted.
struct Inputs {
  ScalarType storage_type, arithmetic;
  int64_t batch, seqlen, heads, headdim, groups, dstate;
  Tensor x, dt, A, B, C;
  MaybeTensor D, z, dt_bias, initial;
  SsdPlan plan;
  Options options;
  const int64_t* order = nullptr;  // of a scan of a grid: the token at each position
  SsdConvolution conv;             // and what makes its x
  int64_t scans = 1;               // outputs are slices of tensors (batch, scans, seqlen, ...)

  Inputs(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const MaybeTensor& D_, const MaybeTensor& z_, const MaybeTensor& dt_bias_, const MaybeTensor& initial_,
         const MaybeTensor& seq_idx, const MaybeTensor& cu_seqlens, const Options& options_)
      : storage_type(x_.scalar_type()), arithmetic(arithmetic_of(storage_of(x_, "x"))), x(dense_last(x_)), dt(dt_),
        A(torch::stable::contiguous(A_)), B(dense_last(B_)), C(dense_last(C_)), options(options_) {
    STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "ssd_scan: x and B must have 4 dimensions");
    batch = x.size(0), seqlen = x.size(1), heads = x.size(2), headdim = x.size(3), groups = B.size(2), dstate = B.size(3);
    STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "ssd_scan: ngroups must divide nheads");
    check_shape(dt, {batch, seqlen, heads}, "dt");
    check_shape(A, {heads}, "A");
    check_shape(B, {batch, seqlen, groups, dstate}, "B");
    check_shape(C, {batch, seqlen, groups, dstate}, "C");
    check_dtype(dt, arithmetic, "dt"), check_dtype(A, arithmetic, "A");
    check_dtype(B, storage_type, "B"), check_dtype(C, storage_type, "C");
    if (z_) {
      check_same(*z_, x, "z");
      z = dense_last(*z_);
    }
    if (D_) {
      check_shape(*D_, D_->dim() == 2 ? std::vector<int64_t>{heads, headdim} : std::vector<int64_t>{heads}, "D");
      check_dtype(*D_, arithmetic, "D");
      D = torch::stable::contiguous(*D_);
    }
    if (dt_bias_) {
      check_shape(*dt_bias_, {heads}, "dt_bias");
      check_dtype(*dt_bias_, arithmetic, "dt_bias");
      dt_bias = torch::stable::contiguous(*dt_bias_);
    }
    make_plan(seq_idx, cu_seqlens, initial_.has_value());
    if (initial_) {
      check_shape(*initial_, {rows(), heads, headdim, dstate}, "initial_states");
      check_dtype(*initial_, arithmetic, "initial_states");
      initial = torch::stable::contiguous(*initial_);
    }
  }

  int64_t rows() const { return static_cast<int64_t>(plan.rows.size()); }
  std::vector<int64_t> state_sizes() const { return {rows(), heads, headdim, dstate}; }

  void make_plan(const MaybeTensor& seq_idx, const MaybeTensor& cu_seqlens, bool given) {
    const int64_t most = options.chunk_size > 0 && options.chunk_size < kSsdChunk ? options.chunk_size : kSsdChunk;
    SsdPlanner planner(most, options.reverse, given);
    if (cu_seqlens) {
      const Tensor bounds = integers(*cu_seqlens);
      const int64_t* offsets = static_cast<const int64_t*>(bounds.const_data_ptr());
      const int64_t count = bounds.numel() - 1;
      STD_TORCH_CHECK(count >= 0 && batch == 1, "ssd_scan: cu_seqlens needs a batch of 1 and at least one offset");
      bool rising = offsets[0] == 0 && offsets[count] == seqlen;
      for (int64_t i = 0; i < count; ++i) rising = rising && offsets[i] <= offsets[i + 1];
      STD_TORCH_CHECK(rising, "ssd_scan: cu_seqlens must rise from 0 to seqlen = ", seqlen, "; its values do not");
      planner.packed(offsets, count);
    } else if (seq_idx) {
      check_shape(*seq_idx, {batch, seqlen}, "seq_idx");
      const Tensor ids = integers(*seq_idx);
      for (int64_t b = 0; b < batch; ++b) {
        planner.ids(b, static_cast<const int64_t*>(ids.const_data_ptr()) + b * seqlen, seqlen);
      }
    } else {
      planner.whole(batch, seqlen);
    }
    plan = std::move(planner.plan);
  }

  void fill(Ssd& call) const {
    call.storage = storage_of(x, "x");
    call.seqlen = seqlen, call.heads = heads, call.groups = groups, call.headdim = headdim, call.dstate = dstate;
    call.rows = rows(), call.most_chunks = plan.most_chunks, call.chunk_tokens = plan.chunk_tokens;
    call.row = plan.rows.data(), call.chunk = plan.chunks.data();
    call.direction = options.reverse ? -1 : 1;
    call.order = order, call.batch_tokens = scans * seqlen;
    call.x = in_of(x), call.B = in_of(B), call.C = in_of(C), call.dt = in_of(dt);
    if (z) call.z = in_of(*z);
    const auto data = [](const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
    call.A = A.const_data_ptr(), call.D = data(D), call.dt_bias = data(dt_bias), call.initial = data(initial);
    call.D_per_channel = D && D->dim() == 2;
    call.softplus = options.softplus, call.dt_low = options.low, call.dt_high = options.high;
  }

  // Tasks that share a group in forward.  y does not depend on it, so the number of threads may decide: the fewest with
  // states_at_once() at most that keep every thread equally busy (B, C and C B^T are made ready once a task).
  int64_t forward_blocks() const {
    const int64_t per_group = heads / groups, threads = torch::stable::get_num_threads();
    const int64_t state_bytes = headdim * dstate * (arithmetic == ScalarType::Double ? 8 : 4);
    const int64_t fit = states_at_once() / (state_bytes > 0 ? state_bytes : 1);
    const int64_t most = fit < 1 ? 1 : fit < per_group ? fit : per_group;
    int64_t blocks = (per_group + most - 1) / most;
    const auto balanced = [&](int64_t units) { return units % threads == 0 || units >= 8 * threads; };
    while (blocks < per_group && !balanced(rows() * groups * blocks)) ++blocks;
    return blocks;
  }

  // In backward dB and dC are summed over a task's heads first, so here only the problem's sizes decide.  8 heads a task
  // keep the sums of all tasks smaller than x; an even number of tasks, four at least, keeps 2 and 4 threads busy.
  int64_t backward_blocks() const {
    const int64_t per_group = heads / groups, others = rows() * groups;
    int64_t blocks = (per_group + 7) / 8;
    while (blocks < per_group && (others * blocks < 4 || others * blocks % 2 != 0)) ++blocks;
    return blocks;
  }
};

// Runs the forward pass into y: (batch, seqlen, heads, headdim), or a slice of (batch, scans, seqlen, heads, headdim).
inline void run_forward(const Inputs& inputs, bool gated, void* y, bool y_arithmetic, void* final) {
  SsdForward call;
  inputs.fill(call);
  if (!gated) call.z = SsdIn{};
  call.head_blocks = inputs.forward_blocks();
  call.conv = inputs.conv;
  call.y = y;
  call.y_arithmetic = y_arithmetic;
  call.final = final;
  if (inputs.headdim > 0) ssd_fwd(call);
}

// Sums over rows, in order: (rows, count) doubles into a tensor of `count` values.
inline Tensor sum_of_rows(const std::vector<double>& values, std::vector<int64_t> sizes, int64_t count, ScalarType dtype) {
  std::vector<double> sums(static_cast<size_t>(count), 0.0);
  for (size_t i = 0; i < values.size(); ++i) sums[i % static_cast<size_t>(count)] += values[i];
  Tensor out = empty(std::move(sizes), dtype);
  for (int64_t i = 0; i < count; ++i) {
    const double value = sums[static_cast<size_t>(i)];
    if (dtype == ScalarType::Double) {
      static_cast<double*>(out.mutable_data_ptr())[i] = value;
    } else {
      static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(value);
    }
  }
  return out;
}

// The gradients of a backward pass that kernels write, and their sums over tasks and rows.  With several scans of a grid
// tensors are (batch, scans, seqlen, ...), and the sums over rows are those of the scan that ran last.
struct Gradients {
  const Inputs& in;
  int64_t blocks;
  Tensor x, dt, B, C, z, initial, parts;
  std::vector<double> A, dt_bias, D;

  Gradients(const Inputs& inputs, bool grid) : in(inputs), blocks(inputs.backward_blocks()),
      x(empty(sizes(grid, {in.heads, in.headdim}), in.storage_type)), dt(empty(sizes(grid, {in.heads}), in.arithmetic)),
      B(empty(sizes(grid, {in.groups, in.dstate}), in.storage_type)),
      C(empty(sizes(grid, {in.groups, in.dstate}), in.storage_type)),
      z(empty(in.z ? sizes_of(x) : std::vector<int64_t>{0}, in.storage_type)),
      initial(empty(in.initial ? in.state_sizes() : std::vector<int64_t>{0}, in.arithmetic)),
      parts(empty({blocks > 1 ? 2 * blocks * B.numel() : 0}, in.arithmetic)),
      A(static_cast<size_t>(in.rows() * in.heads)), dt_bias(A.size()),
      D(in.D ? static_cast<size_t>(in.rows() * in.heads * in.headdim) : 0) {}

  std::vector<int64_t> sizes(bool grid, std::vector<int64_t> rest) const {
    std::vector<int64_t> all{in.batch};
    if (grid) all.push_back(in.scans);
    all.push_back(in.seqlen);
    all.insert(all.end(), rest.begin(), rest.end());
    return all;
  }

  void fill(SsdBackward& call, int64_t scan) {
    const int64_t tokens = scan * in.seqlen;
    const auto at = [&](char* data, int64_t width, int64_t bytes) { return data + tokens * width * bytes; };
    const auto slice = [&](Tensor& tensor, int64_t width) {
      return at(static_cast<char*>(tensor.mutable_data_ptr()), width, static_cast<int64_t>(tensor.element_size()));
    };
    call.head_blocks = blocks;
    call.grad_x = slice(x, in.heads * in.headdim), call.grad_dt = slice(dt, in.heads);
    call.grad_z = slice(z, in.heads * in.headdim);
    call.block_stride = B.numel();
    const int64_t keys = in.groups * in.dstate, bytes = in.arithmetic == ScalarType::Double ? 8 : 4;
    call.grad_B = blocks == 1 ? slice(B, keys) : at(part(0), keys, bytes);
    call.grad_C = blocks == 1 ? slice(C, keys) : at(part(1), keys, bytes);
    call.grad_initial = in.initial ? initial.mutable_data_ptr() : nullptr;
    call.grad_A = A.data(), call.grad_dt_bias = dt_bias.data(), call.grad_D = in.D ? D.data() : nullptr;
  }

  // The sums of the tasks: of dB first, then of dC.
  char* part(int64_t which) {
    const int64_t bytes = in.arithmetic == ScalarType::Double ? 8 : 4;
    return static_cast<char*>(parts.mutable_data_ptr()) + which * blocks * B.numel() * bytes;
  }

  void sum_blocks() {
    if (blocks == 1) return;
    const Storage storage = storage_of(in.x, "x");
    ssd_sum_blocks({storage, blocks, B.numel(), part(0), B.mutable_data_ptr()});
    ssd_sum_blocks({storage, blocks, C.numel(), part(1), C.mutable_data_ptr()});
  }

  Tensor sum_A() const { return sum_of_rows(A, {in.heads}, in.heads, in.arithmetic); }
  Tensor sum_dt_bias() const {
    return in.dt_bias ? sum_of_rows(dt_bias, {in.heads}, in.heads, in.arithmetic) : empty({0}, in.arithmetic);
  }
  Tensor sum_D() const {
    if (!in.D) return empty({0}, in.arithmetic);
    if (in.D->dim() == 2) return sum_of_rows(D, {in.heads, in.headdim}, in.heads * in.headdim, in.arithmetic);
    std::vector<double> by_head(A.size(), 0.0);
    for (size_t i = 0; i < D.size(); ++i) by_head[i / static_cast<size_t>(in.headdim)] += D[i];
    return sum_of_rows(by_head, {in.heads}, in.heads, in.arithmetic);
  }
};

}  // namespace mmkernels::ssd_call
