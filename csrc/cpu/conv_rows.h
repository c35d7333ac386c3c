// Rows of channels that a convolution over time reads and writes: the multiply-add itself, and moves between rows and
// the (channel, time) layout of states and weights.
#pragma once

#include "common/rows.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace mmkernels::MMK_ISA_NS {

inline constexpr int kRowsAtOnce = 4;  // outputs that share a load of each tap

// Parts of this thread's scratch memory, each on a cache line of its own.
struct Carver {
  char* at;
  static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  template <class T> T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(at);
    at += lines(count * static_cast<int64_t>(sizeof(T)));
    return part;
  }
};

template <class A>
struct Taps {
  const A* first;  // multiplies the oldest row
  int64_t stride;  // to the next tap, in elements; negative walks the filter backwards
  int64_t width;
  MMK_INLINE const A* row(int64_t k) const { return first + k * stride; }
};

// sums[r] += sum over k of taps[k] * rows[r + k], for R neighbouring outputs, at channels i...
template <int R, int W, class V, class In, class A, class Lanes>
MMK_INLINE void add_taps(V* sums, const In* const* rows, const Taps<A>& taps, int64_t i, Lanes lanes) {
  if constexpr (W > 0) {
    V row[R + W - 1];
#pragma GCC unroll 8
    for (int r = 0; r < R + W - 1; ++r) row[r] = V::load(rows[r] + i, lanes);
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) {
      const V tap = V::load(taps.row(k) + i, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] = fma(row[r + k], tap, sums[r]);
    }
  } else {
    for (int64_t k = 0; k < taps.width; ++k) {
      const V tap = V::load(taps.row(k) + i, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] = fma(V::load(rows[r + k] + i, lanes), tap, sums[r]);
    }
  }
}

// out[r] = act(bias + sum over k of taps[k] * rows[r + k]) for n channels; rows are in scan order, oldest first.
template <int R, int W, class In, class Out, class A>
void convolve_width(const In* const* rows, const Taps<A>& taps, const A* bias, bool with_silu, Out* const* out,
                    int64_t n) {
  using V = Vec<A>;
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    const V start = bias == nullptr ? V() : V::load(bias + i, lanes);
    V sums[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = start;
    add_taps<R, W>(sums, rows, taps, i, lanes);
    if (with_silu) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] = silu(sums[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r].store(out[r] + i, lanes);
  });
}

// The usual widths have their taps in registers; a single output gains nothing from that.
template <int R, class In, class Out, class A>
MMK_INLINE void convolve(const In* const* rows, const Taps<A>& taps, const A* bias, bool with_silu, Out* const* out,
                         int64_t n) {
  if (R > 1 && taps.width == 4) return convolve_width<R, (R > 1 ? 4 : 0)>(rows, taps, bias, with_silu, out, n);
  if (R > 1 && taps.width == 2) return convolve_width<R, (R > 1 ? 2 : 0)>(rows, taps, bias, with_silu, out, n);
  convolve_width<R, 0>(rows, taps, bias, with_silu, out, n);
}

// ---- between rows and (channel, time) ---------------------------------------------------------------------------------

template <int Count, class T>
void gather_dense(const T* __restrict from, int64_t n, T* __restrict rows, int64_t pitch) {
  for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) rows[k * pitch + c] = from[c * Count + k];
  }
}
template <int Count, class T>
void scatter_dense(const T* __restrict rows, int64_t pitch, int64_t n, T* __restrict to) {
  for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 4
    for (int k = 0; k < Count; ++k) to[c * Count + k] = rows[k * pitch + c];
  }
}

// rows[k][c] = from[c * channel + k * time], `count` rows of n channels, `pitch` apart.
template <class T>
MMK_INLINE void gather_rows(const T* from, int64_t channel, int64_t time, int64_t count, int64_t n, T* rows,
                            int64_t pitch) {
  if (time == 1 && channel == count) {  // so dense that the compiler can shuffle instead of picking
    if (count == 2) return gather_dense<2>(from, n, rows, pitch);
    if (count == 3) return gather_dense<3>(from, n, rows, pitch);
    if (count == 4) return gather_dense<4>(from, n, rows, pitch);
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < n; ++c) rows[k * pitch + c] = from[c * channel + k * time];
  }
}
// to[c * channel + k * time] = rows[k][c].
template <class T>
MMK_INLINE void scatter_rows(const T* rows, int64_t pitch, int64_t channel, int64_t time, int64_t count, int64_t n,
                             T* to) {
  if (time == 1 && channel == count) {
    if (count == 2) return scatter_dense<2>(rows, pitch, n, to);
    if (count == 3) return scatter_dense<3>(rows, pitch, n, to);
    if (count == 4) return scatter_dense<4>(rows, pitch, n, to);
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < n; ++c) to[c * channel + k * time] = rows[k * pitch + c];
  }
}

template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };

// to[i] = from[i * stride]: any storage type in any arithmetic type.
template <class A, class T>
MMK_INLINE void widen_row(const T* from, int64_t stride, int64_t n, A* to) {
  if (Same<A, Arithmetic<T>>::value && stride == 1) {
    if constexpr (Same<A, Arithmetic<T>>::value) {
      for_lanes<Vec<A>>(n, [&](int64_t i, auto lanes) { Vec<A>::load(from + i, lanes).store(to + i, lanes); });
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = A(load_one<Arithmetic<T>>(from + i * stride));
}

// A row of one storage type in another; exact or rounded once.
template <class From, class To>
MMK_INLINE void convert_row(const From* from, int64_t n, To* to) {
  using A = Arithmetic<To>;
  static_assert(Same<A, Arithmetic<From>>::value, "float64 is not mixed with the others");
  for_lanes<Vec<A>>(n, [&](int64_t i, auto lanes) { Vec<A>::load(from + i, lanes).store(to + i, lanes); });
}

}  // namespace mmkernels::MMK_ISA_NS
