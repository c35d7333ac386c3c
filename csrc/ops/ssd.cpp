// The torch side of the state-space scan: checks, the cut into chunks, outputs, and the calls of csrc/cpu/ssd_*.cpp.
#include "cpu/ssd.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "cpu/ssd_plan.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// A tensor whose last dimension is dense: itself, or a copy where it is not.
Tensor dense_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

SsdIn in_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_shape(const Tensor& tensor, std::vector<int64_t> sizes, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  STD_TORCH_CHECK(same, "ssd_scan: ", name, " has the wrong shape");
}

void check_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "ssd_scan: ", name, " has the wrong dtype");
}

// Integers on the CPU, dense, as int64.
Tensor integers(const Tensor& tensor) {
  return torch::stable::contiguous(
      tensor.scalar_type() == ScalarType::Long ? tensor : torch::stable::to(tensor, ScalarType::Long));
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
    call.x = in_of(x), call.B = in_of(B), call.C = in_of(C), call.dt = in_of(dt);
    if (z) call.z = in_of(*z);
    const auto data = [](const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
    call.A = A.const_data_ptr(), call.D = data(D), call.dt_bias = data(dt_bias), call.initial = data(initial);
    call.D_per_channel = D && D->dim() == 2;
    call.softplus = options.softplus, call.dt_low = options.low, call.dt_high = options.high;
  }

  // Tasks that share a group in forward.  y does not depend on it, so the number of threads may decide: the fewest with
  // 256 KiB of states at most that keep every thread equally busy (C B^T is computed once a task).
  int64_t forward_blocks() const {
    const int64_t per_group = heads / groups, threads = torch::stable::get_num_threads();
    const int64_t state_bytes = headdim * dstate * (arithmetic == ScalarType::Double ? 8 : 4);
    const int64_t fit = 262144 / (state_bytes > 0 ? state_bytes : 1);
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

Tensor run_forward(const Inputs& inputs, bool gated, ScalarType y_type, void* final) {
  Tensor y = empty({inputs.batch, inputs.seqlen, inputs.heads, inputs.headdim}, y_type);
  SsdForward call;
  inputs.fill(call);
  if (!gated) call.z = SsdIn{};
  call.head_blocks = inputs.forward_blocks();
  call.y = y.mutable_data_ptr();
  call.y_arithmetic = y_type != inputs.storage_type;
  call.final = final;
  if (inputs.headdim > 0) ssd_fwd(call);
  return y;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                   const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& dt_bias,
                                   const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                                   const MaybeTensor& cu_seqlens, bool dt_softplus, double dt_low, double dt_high,
                                   int64_t chunk_size, bool reverse, bool return_final_states) {
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, reverse};
  const Inputs inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, options);
  Tensor final = empty(return_final_states ? inputs.state_sizes() : std::vector<int64_t>{0}, inputs.arithmetic);
  Tensor y = run_forward(inputs, true, inputs.storage_type, return_final_states ? final.mutable_data_ptr() : nullptr);
  return {y, final};
}

// Sums over rows, in order: (rows, count) doubles into a tensor of `count` values.
Tensor sum_of_rows(const std::vector<double>& values, std::vector<int64_t> sizes, int64_t count, ScalarType dtype) {
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

// The gradients of a backward pass that kernels write, and their sums over tasks and rows.
struct Gradients {
  const Inputs& in;
  int64_t blocks;
  Tensor x, dt, B, C, z, initial, parts;
  std::vector<double> A, dt_bias, D;

  explicit Gradients(const Inputs& inputs) : in(inputs), blocks(inputs.backward_blocks()),
      x(empty({in.batch, in.seqlen, in.heads, in.headdim}, in.storage_type)),
      dt(empty({in.batch, in.seqlen, in.heads}, in.arithmetic)),
      B(empty({in.batch, in.seqlen, in.groups, in.dstate}, in.storage_type)),
      C(empty({in.batch, in.seqlen, in.groups, in.dstate}, in.storage_type)),
      z(empty(in.z ? sizes_of(x) : std::vector<int64_t>{0}, in.storage_type)),
      initial(empty(in.initial ? in.state_sizes() : std::vector<int64_t>{0}, in.arithmetic)),
      parts(empty({blocks > 1 ? 2 * blocks * B.numel() : 0}, in.arithmetic)),
      A(static_cast<size_t>(in.rows() * in.heads)), dt_bias(A.size()),
      D(in.D ? static_cast<size_t>(in.rows() * in.heads * in.headdim) : 0) {}

  void fill(SsdBackward& call) {
    call.head_blocks = blocks;
    call.grad_x = x.mutable_data_ptr(), call.grad_dt = dt.mutable_data_ptr();
    call.grad_z = z.mutable_data_ptr();
    call.block_stride = B.numel();
    if (blocks == 1) {
      call.grad_B = B.mutable_data_ptr(), call.grad_C = C.mutable_data_ptr();
    } else {
      call.grad_B = part(0), call.grad_C = part(1);
    }
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

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors backward(const Tensor& grad_y, const MaybeTensor& grad_final, const Tensor& x, const Tensor& dt,
                     const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                     const MaybeTensor& dt_bias, const MaybeTensor& initial_states, const MaybeTensor& seq_idx,
                     const MaybeTensor& cu_seqlens, bool dt_softplus, double dt_low, double dt_high, int64_t chunk_size,
                     bool reverse) {
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, reverse};
  const Inputs inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, options);
  check_same(grad_y, x, "grad_y");
  const Tensor grad = dense_last(grad_y);
  MaybeTensor final, y;
  if (grad_final) {
    check_shape(*grad_final, inputs.state_sizes(), "grad_final_states");
    check_dtype(*grad_final, inputs.arithmetic, "grad_final_states");
    final = torch::stable::contiguous(*grad_final);
  }
  if (z) y = run_forward(inputs, false, inputs.arithmetic, nullptr);
  Gradients gradients(inputs);
  SsdBackward call;
  inputs.fill(call);
  gradients.fill(call);
  call.grad_y = in_of(grad);
  call.grad_final = final ? final->const_data_ptr() : nullptr;
  call.y = y ? y->const_data_ptr() : nullptr;
  ssd_bwd(call);
  gradients.sum_blocks();
  return {gradients.x, gradients.dt, gradients.sum_A(), gradients.B, gradients.C, gradients.sum_D(), gradients.z,
          gradients.sum_dt_bias(), gradients.initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("ssd_scan", TORCH_BOX(&forward));
  m.impl("ssd_scan_fwd", TORCH_BOX(&forward));
  m.impl("ssd_scan_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
