// One or a few tokens of a causal convolution, continued from states that are shifted in place.
//
// A task takes a row and some channels.  It turns its part of the state and of the weight into rows of channels, which
// is most of the work for a single token, then runs the same multiply-adds as the whole convolution.
#include "common/parallel.h"
#include "cpu/causal_conv1d.h"
#include "cpu/conv_rows.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int64_t kSlice = 256;  // channels of a task: states, taps and outputs of one token stay in L1

// The scratch memory of a task.
template <class T, class S, class A>
struct StepScratch {
  const T** rows;      // history and new tokens, oldest first
  S* window;           // the old state, then the tokens that enter it
  T* history;          // the last width - 1 inputs; where T is S, that part of the window
  A *taps, *bias;
  void* weight;        // taps as stored, before they are widened

  StepScratch(const CausalConv1dUpdate& a, int64_t entering) {
    const int64_t window_rows = a.state_len + entering, most = kSlice;
    const int64_t bytes = sizeof(void*) * (a.width + a.tokens) + sizeof(S) * most * window_rows +
                          most * a.width * (sizeof(T) + sizeof(A) + sizeof(double)) + sizeof(A) * most + 6 * 64;
    Carver carver{static_cast<char*>(thread_scratch(bytes))};
    rows = carver.take<const T*>(a.width + a.tokens);
    window = carver.take<S>(most * window_rows);
    history = carver.take<T>(most * a.width);
    taps = carver.take<A>(most * a.width);
    bias = carver.take<A>(most);
    weight = carver.take<double>(most * a.width);
  }
};

// The taps and the bias of n channels as rows in the arithmetic type.
template <class A>
void load_filter(const CausalConv1dUpdate& a, int64_t at, int64_t n, A* taps, A* bias, void* stored) {
  with_storage(a.weight_storage, [&](auto element) {
    using P = decltype(element);
    const P* from = static_cast<const P*>(a.weight) + at * a.weight_channel;
    if constexpr (Same<P, A>::value) {
      gather_rows(from, a.weight_channel, a.weight_tap, a.width, n, taps, n);
    } else {
      gather_rows(from, a.weight_channel, a.weight_tap, a.width, n, static_cast<P*>(stored), n);
      widen_row(static_cast<const P*>(stored), 1, a.width * n, taps);
    }
  });
  if (a.bias == nullptr) return;
  with_storage(a.bias_storage, [&](auto element) {
    using P = decltype(element);
    widen_row(static_cast<const P*>(a.bias) + at * a.bias_channel, a.bias_channel, n, bias);
  });
}

template <class T, class S>
void step_row(const CausalConv1dUpdate& a, int64_t row, int64_t at, int64_t n) {
  using A = Arithmetic<T>;
  const T* x = static_cast<const T*>(a.x.data) + row * a.x.row + at;
  T* y = static_cast<T*>(a.y.data) + row * a.y.row + at;
  const int64_t slot = a.slots == nullptr ? row : a.slots[row];
  if (slot < 0) {
    for (int64_t t = 0; t < a.tokens; ++t) __builtin_memset(static_cast<void*>(y + t * a.y.token), 0, sizeof(T) * n);
    return;
  }
  const int64_t entering = a.tokens < a.state_len ? a.tokens : a.state_len, history = a.width - 1;
  const StepScratch<T, S, A> scratch(a, entering);
  load_filter(a, at, n, scratch.taps, scratch.bias, scratch.weight);
  S* state = static_cast<S*>(a.state.data) + slot * a.state.row + at * a.state.channel;
  gather_rows(static_cast<const S*>(state), a.state.channel, a.state.time, a.state_len, n, scratch.window, n);
  for (int64_t j = 0; j < entering; ++j) {
    convert_row(x + (a.tokens - entering + j) * a.x.token, n, scratch.window + (a.state_len + j) * n);
  }
  const S* last = scratch.window + (a.state_len - history) * n;
  if constexpr (Same<T, S>::value) {
    for (int64_t j = 0; j < history; ++j) scratch.rows[j] = last + j * n;
  } else {
    convert_row(last, history * n, scratch.history);
    for (int64_t j = 0; j < history; ++j) scratch.rows[j] = scratch.history + j * n;
  }
  for (int64_t t = 0; t < a.tokens; ++t) scratch.rows[history + t] = x + t * a.x.token;
  const Taps<A> taps{scratch.taps, n, a.width};
  const A* bias = a.bias == nullptr ? nullptr : scratch.bias;
  for (int64_t t = 0; t < a.tokens; ++t) {
    T* out[1] = {y + t * a.y.token};
    convolve<1>(scratch.rows + t, taps, bias, a.silu, out, n);
  }
  scatter_rows(static_cast<const S*>(scratch.window + entering * n), n, a.state.channel, a.state.time, a.state_len, n,
               state);
}

template <class T, class S>
void step(const CausalConv1dUpdate& a) {
  const int64_t slices = (a.dim + kSlice - 1) / kSlice;
  const int64_t most = a.dim < kSlice ? a.dim : kSlice;
  parallel_for(a.batch * slices, grain_of(most * (a.width + a.tokens)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = i % slices * kSlice;
      step_row<T, S>(a, i / slices, at, at + kSlice < a.dim ? kSlice : a.dim - at);
    }
  });
}

}  // namespace

void causal_conv1d_step(const CausalConv1dUpdate& a) {
  with_storage(a.storage, [&](auto element) {
    with_storage(a.state_storage, [&](auto state_element) {
      using T = decltype(element);
      using S = decltype(state_element);
      if constexpr (Same<Arithmetic<T>, Arithmetic<S>>::value) {
        step<T, S>(a);
      }
    });
  });
}

}  // namespace mmkernels::MMK_ISA_NS
