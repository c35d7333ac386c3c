// One token of a Mamba-2 block: the kernels of its parts, one after the other, on one workspace.
//
// Everything between two parts stays in the arithmetic type, and in cache; a call allocates its results and one block.
#include "cpu/mamba2_step.h"

#include <tuple>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "cpu/causal_conv1d.h"
#include "cpu/decode_linear.h"
#include "cpu/gated_rms_norm.h"
#include "cpu/ssd_update.h"

namespace mmkernels {

namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensors and options of a call, as in the schema.
struct StepInputs {
  const Tensor &hidden, &conv_state, &ssm_state, &in_weight, &conv_weight, &A_log, &dt_bias, &D, &out_weight;
  const MaybeTensor &residual, &norm_weight, &in_bias, &conv_bias, &gate_weight, &out_bias;
  double eps, gate_eps, dt_low, dt_high;
  bool norm_before_gate, residual_in_fp32;
};

struct StepSizes {
  int64_t batch, model, heads, headdim, states, groups, inner, conv, width, projected;

  explicit StepSizes(const StepInputs& s) {
    STD_TORCH_CHECK(s.hidden.dim() == 2 && s.ssm_state.dim() == 4 && s.conv_state.dim() == 3 && s.in_weight.dim() == 2 &&
                        s.out_weight.dim() == 2 && (s.conv_weight.dim() == 2 || s.conv_weight.dim() == 3),
                    "mamba2_step: a tensor has the wrong number of dimensions");
    batch = s.hidden.size(0), model = s.hidden.size(1);
    heads = s.ssm_state.size(1), headdim = s.ssm_state.size(2), states = s.ssm_state.size(3);
    inner = heads * headdim, conv = s.conv_weight.size(0), projected = s.in_weight.size(0);
    width = s.conv_weight.size(s.conv_weight.dim() - 1);
    STD_TORCH_CHECK(states > 0 && (conv - inner) % (2 * states) == 0 && conv > inner, "mamba2_step: conv_weight is wrong");
    groups = (conv - inner) / (2 * states);
    STD_TORCH_CHECK(heads % groups == 0 && projected == inner + conv + heads, "mamba2_step: in_weight is wrong");
    STD_TORCH_CHECK(s.in_weight.size(1) == model && s.out_weight.size(0) == model && s.out_weight.size(1) == inner,
                    "mamba2_step: a projection is wrong");
    STD_TORCH_CHECK(s.ssm_state.size(0) == batch && s.conv_state.size(0) == batch && s.conv_state.size(1) == conv &&
                        width >= 1 && s.conv_state.size(2) >= width - 1 && s.conv_weight.numel() == conv * width,
                    "mamba2_step: a state is wrong");
    STD_TORCH_CHECK(states <= 1 || s.ssm_state.stride(3) == 1, "mamba2_step: the columns of ssm_state must be dense");
    const auto vector = [](const MaybeTensor& tensor, int64_t size) {
      return !tensor || (tensor->dim() == 1 && tensor->size(0) == size);
    };
    STD_TORCH_CHECK(vector(s.A_log, heads) && vector(s.dt_bias, heads) && vector(s.in_bias, projected) &&
                        vector(s.conv_bias, conv) && vector(s.gate_weight, inner) && vector(s.out_bias, model) &&
                        vector(s.norm_weight, model),
                    "mamba2_step: a parameter has the wrong size");
    STD_TORCH_CHECK(vector(s.D, heads) || (s.D.dim() == 2 && s.D.size(0) == heads && s.D.size(1) == headdim),
                    "mamba2_step: D is wrong");
  }
};

// Parts of one block of memory, each on a cache line of its own.
class Workspace {
 public:
  explicit Workspace(size_t element) : element_(element) {}
  size_t reserve(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * element_ + 63) / 64 * 64;
    return at;
  }
  void allocate() {
    owner_ = empty({static_cast<int64_t>(bytes_ + 64)}, ScalarType::Byte);
    const uintptr_t start = reinterpret_cast<uintptr_t>(owner_->mutable_data_ptr());
    base_ = reinterpret_cast<char*>((start + 63) / 64 * 64);
  }
  char* at(size_t offset, int64_t element = 0) const { return base_ + offset + element * element_; }

 private:
  size_t element_, bytes_ = 0;
  char* base_ = nullptr;
  MaybeTensor owner_;
};

// A parameter vector with dense elements; parameters nearly always are.
Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
MaybeTensor dense(const MaybeTensor& tensor) { return tensor ? MaybeTensor(dense(*tensor)) : MaybeTensor(); }

SsdVector vector_of(const Tensor& tensor, const char* name) {
  SsdVector view;
  view.data = tensor.const_data_ptr();
  view.storage = storage_of(tensor, name);
  view.head = tensor.stride(0);
  view.item = tensor.dim() == 2 ? tensor.stride(1) : 0;
  return view;
}

class Step {
 public:
  explicit Step(const StepInputs& inputs)
      : s_(inputs), n_(inputs), storage_(storage_of(s_.hidden, "hidden") == Storage::f64 ? Storage::f64 : Storage::f32),
        space_(storage_ == Storage::f64 ? 8 : 4) {
    const int64_t b = n_.batch, wider = n_.inner > n_.model ? n_.inner : n_.model;
    packed_ = space_.reserve(decode_linear_packed(b, wider));
    u_ = space_.reserve(b * n_.model);
    projected_ = space_.reserve(b * n_.projected);
    conv_ = space_.reserve(b * n_.conv);
    y_ = space_.reserve(b * n_.inner);
    closed_ = space_.reserve(b * n_.inner);
    rate_ = space_.reserve(n_.heads);
    gate_weight_ = space_.reserve(n_.inner);
    space_.allocate();
  }

  std::tuple<Tensor, Tensor> run() {
    const Rows hidden = rows_of(s_.hidden);
    Tensor sum = empty({0}, s_.hidden.scalar_type());
    if (s_.norm_weight) {
      sum = add(hidden);
      project({space_.at(u_), n_.model}, storage_, s_.in_weight, s_.in_bias,
              {space_.at(projected_), n_.projected}, storage_);
    } else {
      project(hidden.in(), storage_of(s_.hidden, "hidden"), s_.in_weight, s_.in_bias,
              {space_.at(projected_), n_.projected}, storage_);
    }
    convolve();
    recur();
    if (s_.gate_weight) close();
    Tensor out = empty({n_.batch, n_.model}, s_.out_weight.scalar_type());
    project({space_.at(s_.gate_weight ? closed_ : y_), n_.inner}, storage_, s_.out_weight, s_.out_bias,
            {out.mutable_data_ptr(), n_.model}, storage_of(out, "out"));
    return {out, sum};
  }

 private:
  Tensor add(const Rows& hidden) {
    // The dtype of the sum: that of hidden and residual together, at least float32 if asked.
    ScalarType type = s_.hidden.scalar_type();
    if (s_.residual && s_.residual->scalar_type() != type) type = ScalarType::Float;
    if (storage_ == Storage::f64) type = ScalarType::Double;
    if (s_.residual_in_fp32 && type != ScalarType::Double) type = ScalarType::Float;
    Tensor sum = empty({n_.batch, n_.model}, type);
    const Tensor weight = dense(*s_.norm_weight);
    std::optional<Rows> residual;
    if (s_.residual) residual = rows_of(*s_.residual);
    AddNorm call;
    call.hidden_storage = storage_of(s_.hidden, "hidden");
    call.residual_storage = residual ? storage_of(*s_.residual, "residual") : storage_;
    call.sum_storage = storage_of(sum, "sum");
    call.weight_storage = storage_of(weight, "norm_weight");
    call.rows = n_.batch;
    call.dim = n_.model;
    call.eps = s_.eps;
    call.hidden = hidden.in();
    if (residual) call.residual = residual->in();
    call.sum = {sum.mutable_data_ptr(), n_.model};
    call.weight = weight.const_data_ptr();
    call.normed = space_.at(u_);
    add_norm(call);
    return sum;
  }

  void project(RowsIn x, Storage x_storage, const Tensor& weight, const MaybeTensor& bias, RowsOut y,
               Storage y_storage) const {
    const Rows weights = rows_of(weight);
    const MaybeTensor dense_bias = dense(bias);
    DecodeLinear call;
    call.x_storage = x_storage;
    call.weight_storage = storage_of(weight, "weight");
    call.bias_storage = bias ? storage_of(*bias, "bias") : call.weight_storage;
    call.y_storage = y_storage;
    call.rows = n_.batch;
    call.in = weight.size(1);
    call.out = weight.size(0);
    call.x = x;
    call.weight = weights.in();
    call.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
    call.y = y;
    call.packed = space_.at(packed_);
    decode_linear(call);
  }

  void convolve() const {
    CausalConv1dUpdate call;
    call.storage = storage_;
    call.state_storage = storage_of(s_.conv_state, "conv_state");
    call.weight_storage = storage_of(s_.conv_weight, "conv_weight");
    call.bias_storage = s_.conv_bias ? storage_of(*s_.conv_bias, "conv_bias") : Storage::f32;
    call.batch = n_.batch;
    call.tokens = 1;
    call.dim = n_.conv;
    call.width = n_.width;
    call.state_len = s_.conv_state.size(2);
    call.silu = true;
    call.x = {space_.at(projected_, n_.inner), n_.projected, 0};
    call.y = {space_.at(conv_), n_.conv, 0};
    call.state = {s_.conv_state.mutable_data_ptr(), s_.conv_state.stride(0), s_.conv_state.stride(1),
                  s_.conv_state.stride(2)};
    call.slots = nullptr;
    call.weight = s_.conv_weight.const_data_ptr();
    call.weight_channel = s_.conv_weight.stride(0);
    call.weight_tap = s_.conv_weight.stride(s_.conv_weight.dim() - 1);
    call.bias = s_.conv_bias ? s_.conv_bias->const_data_ptr() : nullptr;
    call.bias_channel = s_.conv_bias ? s_.conv_bias->stride(0) : 0;
    causal_conv1d_step(call);
  }

  void recur() const {
    widen({storage_of(s_.A_log, "A_log"), storage_ == Storage::f64, true, n_.heads, s_.A_log.stride(0),
           s_.A_log.const_data_ptr(), space_.at(rate_)});
    SsdUpdate call;
    call.storage = storage_;
    call.state_storage = storage_of(s_.ssm_state, "ssm_state");
    call.batch = n_.batch;
    call.tokens = 1;
    call.heads = n_.heads;
    call.headdim = n_.headdim;
    call.groups = n_.groups;
    call.dstate = n_.states;
    call.softplus = true;
    call.low = s_.dt_low;
    call.high = s_.dt_high;
    call.x = view(conv_, 0, n_.conv, n_.headdim);
    call.B = view(conv_, n_.inner, n_.conv, n_.states);
    call.C = view(conv_, n_.inner + n_.groups * n_.states, n_.conv, n_.states);
    if (!s_.gate_weight) call.z = view(projected_, 0, n_.projected, n_.headdim);
    call.dt = view(projected_, n_.inner + n_.conv, n_.projected, 1);
    call.A = view(rate_, 0, 0, 1);
    call.dt_bias = vector_of(s_.dt_bias, "dt_bias");
    call.D = vector_of(s_.D, "D");
    call.y = space_.at(y_);
    call.state = s_.ssm_state.mutable_data_ptr();
    call.state_slot = s_.ssm_state.stride(0);
    call.state_head = s_.ssm_state.stride(1);
    call.state_row = s_.ssm_state.stride(2);
    call.slots = nullptr;
    ssd_update(call);
  }

  void close() const {
    widen({storage_of(*s_.gate_weight, "gate_weight"), storage_ == Storage::f64, false, n_.inner,
           s_.gate_weight->stride(0), s_.gate_weight->const_data_ptr(), space_.at(gate_weight_)});
    GatedRmsNormForward call;
    call.storage = storage_;
    call.rows = n_.batch;
    call.dim = n_.inner;
    call.group_size = n_.inner / n_.groups;
    call.parameter_stride = call.group_size;
    call.norm_before_gate = s_.norm_before_gate;
    call.x = {space_.at(y_), n_.inner};
    call.z = {space_.at(projected_), n_.projected};
    call.weight = space_.at(gate_weight_);
    call.bias = nullptr;
    call.eps = s_.gate_eps;
    call.y = {space_.at(closed_), n_.inner};
    call.rstd = nullptr;
    gated_rms_norm_fwd(call);
  }

  SsdVector view(size_t part, int64_t first, int64_t row, int64_t head) const {
    SsdVector made;
    made.data = space_.at(part, first);
    made.storage = storage_;
    made.row = row;
    made.head = head;
    made.item = 1;
    return made;
  }

  StepInputs s_;
  StepSizes n_;
  Storage storage_;  // of everything between the parts
  Workspace space_;
  size_t packed_, u_, projected_, conv_, y_, closed_, rate_, gate_weight_;
};

std::tuple<Tensor, Tensor> checked_step(const StepInputs& s) {
  const bool wide = storage_of(s.hidden, "hidden") == Storage::f64;
  const auto mixed = [&](const Tensor& tensor) { return (tensor.scalar_type() == ScalarType::Double) != wide; };
  bool any = false;
  for (const Tensor* tensor : {&s.conv_state, &s.ssm_state, &s.in_weight, &s.out_weight}) any |= mixed(*tensor);
  for (const MaybeTensor* tensor : {&s.residual, &s.norm_weight, &s.in_bias, &s.out_bias}) {
    any |= *tensor && mixed(**tensor);
  }
  STD_TORCH_CHECK(!any, "mamba2_step: float64 must be the dtype of every tensor or of none");
  return Step(s).run();
}

std::tuple<Tensor, Tensor> step(const Tensor& hidden, const Tensor& conv_state, const Tensor& ssm_state,
                                const Tensor& in_weight, const Tensor& conv_weight, const Tensor& A_log,
                                const Tensor& dt_bias, const Tensor& D, const Tensor& out_weight,
                                const MaybeTensor& residual, const MaybeTensor& norm_weight, const MaybeTensor& in_bias,
                                const MaybeTensor& conv_bias, const MaybeTensor& gate_weight,
                                const MaybeTensor& out_bias, double eps, double gate_eps, double dt_low, double dt_high,
                                bool norm_before_gate, bool residual_in_fp32) {
  return checked_step({hidden,   conv_state,  ssm_state, in_weight, conv_weight, A_log,    dt_bias,
                       D,        out_weight,  residual,  norm_weight, in_bias,   conv_bias, gate_weight,
                       out_bias, eps,         gate_eps,  dt_low,    dt_high,     norm_before_gate, residual_in_fp32});
}

// How a block's tensors and numbers lie in the lists of `steps`; mmkernels/ops/mamba2_step/_native.py builds them.
constexpr size_t kParameters = 11, kNumbers = 6;

std::tuple<Tensor, Tensor> steps(const Tensor& hidden, const MaybeTensor& residual, std::vector<Tensor> conv_states,
                                 std::vector<Tensor> ssm_states, std::vector<MaybeTensor> parameters,
                                 std::vector<double> numbers) {
  const size_t blocks = conv_states.size();
  STD_TORCH_CHECK(blocks > 0 && ssm_states.size() == blocks && parameters.size() == blocks * kParameters &&
                      numbers.size() == blocks * kNumbers,
                  "mamba2_steps: the lists must have the states, parameters and numbers of the same blocks");
  Tensor out = hidden;
  MaybeTensor sum = residual;
  for (size_t i = 0; i < blocks; ++i) {
    const MaybeTensor* p = parameters.data() + i * kParameters;
    const double* x = numbers.data() + i * kNumbers;
    for (int required = 0; required < 7; ++required) {
      STD_TORCH_CHECK(p[required].has_value(), "mamba2_steps: a block lacks a weight");
    }
    const MaybeTensor before = sum;
    const Tensor into = out;
    std::tie(out, sum) = checked_step({into,  conv_states[i], ssm_states[i], *p[0], *p[1], *p[2],     *p[3],
                                       *p[4], *p[5],          before,        p[6],  p[7],  p[8],      p[9],
                                       p[10], x[0],           x[1],          x[2],  x[3],  x[4] != 0, x[5] != 0});
  }
  return {out, *sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("mamba2_step", TORCH_BOX(&step));
  m.impl("mamba2_steps", TORCH_BOX(&steps));
}

}  // namespace mmkernels
