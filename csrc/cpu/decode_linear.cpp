// y = x W^T + b for a few rows of x, bound by the reading of W: every weight comes from memory once.
//
// Weights are widened to the arithmetic type in registers.  For bfloat16 a register of pairs becomes the even and the odd
// elements by a shift and a mask, without a shuffle; x is laid out to match, once a call.  (The bfloat16 dot-product
// instruction is the slow path: half the rate of float32 multiply-adds on the processors that have both, and it drops
// subnormals.)  One chain of multiply-adds per output, whatever the number of rows and threads: neither changes a bit.
#include "cpu/decode_linear.h"

#include "common/parallel.h"
#include "common/vec.h"
#include "cpu/conv_rows.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int kOutputs = 4;    // rows of W that share a load of x, where there are several rows of x
constexpr int kInOrder = 16;  // outputs of a single row of x that are written together
// Rows of x that share a load of W: with the outputs, what the register file holds.
#if defined(__AVX512F__)
constexpr int kTokens = 4;
#else
constexpr int kTokens = 2;
#endif

// Two registers of the next 2 * size weights, in the order of `pack`.
template <class A, class W>
MMK_INLINE void load_two(const W* from, Vec<A>& first, Vec<A>& second) {
  first = Vec<A>::load(from);
  second = Vec<A>::load(from + Vec<A>::size);
}
template <>
MMK_INLINE void load_two(const bf16* from, Vec<float>& even, Vec<float>& odd) {
  Words pairs;
  __builtin_memcpy(&pairs, from, sizeof(pairs));
  even = bit_cast<VecTypes<float>::Raw>(pairs << 16);
  odd = bit_cast<VecTypes<float>::Raw>(pairs & 0xffff0000u);
}

// Lanes first, first + 2, ... of a, then those of b.
template <int first, class A>
MMK_INLINE Vec<A> every_second(Vec<A> a, Vec<A> b) {
  constexpr int n = Vec<A>::size, f = first;
  if constexpr (n == 4) {
    return MMK_SHUFFLE(a.raw, b.raw, f, 2 + f, 4 + f, 6 + f);
  } else if constexpr (n == 8) {
    return MMK_SHUFFLE(a.raw, b.raw, f, 2 + f, 4 + f, 6 + f, 8 + f, 10 + f, 12 + f, 14 + f);
  } else {
    return MMK_SHUFFLE(a.raw, b.raw, f, 2 + f, 4 + f, 6 + f, 8 + f, 10 + f, 12 + f, 14 + f, 16 + f, 18 + f, 20 + f,
                       22 + f, 24 + f, 26 + f, 28 + f, 30 + f);
  }
}

// A row of x in the arithmetic type; where the weights are bfloat16, each whole block of 2 * size as evens, then odds.
template <class W, class A>
void pack(const DecodeLinear& a, int64_t row, A* to) {
  with_storage(a.x_storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (Same<A, Arithmetic<T>>::value) widen_row(row_of<T>(a.x, row), 1, a.in, to);
  });
  if constexpr (Same<W, bf16>::value) {
    using V = Vec<A>;
    for (int64_t k = 0; k + 2 * V::size <= a.in; k += 2 * V::size) {
      const V first = V::load(to + k), second = V::load(to + k + V::size);
      every_second<0>(first, second).store(to + k);
      every_second<1>(first, second).store(to + k + V::size);
    }
  }
}

// How far ahead of the multiply-adds weights are asked for, counted along memory: one stream that rises steadily, although
// R rows are read side by side, because that is what memory delivers fastest.  A single row of x needs no sharing: its
// weights are read in order, and the processor fetches ahead by itself (98 % of a plain read).
enum Ahead {
  near,  // into L1, where the weights in flight and x fit beside each other (97 % of a plain read; far: 70 %)
  far,   // into L2, R rows ahead
  in_order,
};
constexpr int64_t kNearBytes = 16384;

// out[m][r] = <row r of W, row m of x>.
template <int R, int M, Ahead ahead, class W, class A>
MMK_INLINE void products(const W* w, int64_t stride, const A* x, int64_t pitch, int64_t n, A (&out)[M][R]) {
  using V = Vec<A>;
  constexpr int64_t step = 2 * V::size;
  V sums[R][M];
  int64_t k = 0;
  for (; k + step <= n; k += step) {
    V first[R], second[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // Beyond the weights, or between the rows of a view, a prefetch is useless but harmless.
      for (int64_t line = 0; line < step * static_cast<int64_t>(sizeof(W)); line += 64) {
        const char* next = reinterpret_cast<const char*>(w + k * R + r * step) + line;
        if constexpr (ahead == near) {
          __builtin_prefetch(next + kNearBytes, 0, 3);
        } else {
          __builtin_prefetch(next + R * stride * static_cast<int64_t>(sizeof(W)), 0, 2);
        }
      }
      load_two(w + r * stride + k, first[r], second[r]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = V::load(x + m * pitch + k), b = V::load(x + m * pitch + k + V::size);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][m] = fma(second[r], b, fma(first[r], a, sums[r][m]));
    }
  }
  for (; k < n; k += V::size) {
    const int lanes = n - k < V::size ? static_cast<int>(n - k) : V::size;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = V::load(x + m * pitch + k, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][m] = fma(V::load(w + r * stride + k, lanes), a, sums[r][m]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[m][r] = sum(sums[r][m]);
  }
}

// out[0][r] = <row r of W, x>, one r after the other; the same sums as above.
template <int R, class W, class A>
MMK_INLINE void products_in_order(const W* w, int64_t stride, const A* x, int64_t n, A (&out)[1][R]) {
  using V = Vec<A>;
  for (int r = 0; r < R; ++r, w += stride) {
    V total;
    int64_t k = 0;
    for (; k + 2 * V::size <= n; k += 2 * V::size) {
      V first, second;
      load_two(w + k, first, second);
      total = fma(second, V::load(x + k + V::size), fma(first, V::load(x + k), total));
    }
    for (; k < n; k += V::size) {
      const int lanes = n - k < V::size ? static_cast<int>(n - k) : V::size;
      total = fma(V::load(w + k, lanes), V::load(x + k, lanes), total);
    }
    out[0][r] = sum(total);
  }
}

// R outputs of M rows.
template <int R, int M, Ahead ahead, class W, class A>
void outputs(const DecodeLinear& a, int64_t output, int64_t row) {
  using V = Vec<A>;
  const int64_t pitch = decode_linear_pitch(a.in);
  A out[M][R];
  const W* weights = row_of<W>(a.weight, output);
  const A* x = static_cast<const A*>(a.packed) + row * pitch;
  if constexpr (ahead == in_order) {
    products_in_order(weights, a.weight.stride, x, a.in, out);
  } else {
    products<R, M, ahead>(weights, a.weight.stride, x, pitch, a.in, out);
  }
  A bias[R] = {};
  if (a.bias != nullptr) {
    with_storage(a.bias_storage, [&](auto element) {
      using T = decltype(element);
      if constexpr (Same<A, Arithmetic<T>>::value) widen_row(static_cast<const T*>(a.bias) + output, 1, R, bias);
    });
  }
  with_storage(a.y_storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (Same<A, Arithmetic<T>>::value) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        T* y = row_of<T>(a.y, row + m) + output;
        for_lanes<V>(R, [&](int64_t i, auto lanes) {
          (V::load(out[m] + i, lanes) + V::load(bias + i, lanes)).store(y + i, lanes);
        });
      }
    }
  });
}

// R outputs of every row; after the first rows the weights are in the cache.
template <int R, Ahead ahead, class W, class A>
void block(const DecodeLinear& a, int64_t output) {
  if constexpr (ahead == in_order) {
    outputs<R, 1, ahead, W, A>(a, output, 0);
  } else {
    int64_t row = 0;
    for (; row + kTokens <= a.rows; row += kTokens) outputs<R, kTokens, ahead, W, A>(a, output, row);
    if constexpr (kTokens > 2) {
      if (row + 2 <= a.rows) {
        outputs<R, 2, ahead, W, A>(a, output, row);
        row += 2;
      }
    }
    if (row < a.rows) outputs<R, 1, ahead, W, A>(a, output, row);
  }
}

template <int R, Ahead ahead, class W, class A>
void blocks(const DecodeLinear& a) {
  parallel_for((a.out + R - 1) / R, grain_of(R * a.in * a.rows), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t output = i * R;
      if (output + R <= a.out) {
        block<R, ahead, W, A>(a, output);
      } else {
        for (int64_t rest = output; rest < a.out; ++rest) block<1, ahead, W, A>(a, rest);
      }
    }
  });
}

template <class W>
void run(const DecodeLinear& a) {
  using A = Arithmetic<W>;
  for (int64_t row = 0; row < a.rows; ++row) {
    pack<W>(a, row, static_cast<A*>(a.packed) + row * decode_linear_pitch(a.in));
  }
  const int64_t weights = kOutputs * a.in * static_cast<int64_t>(sizeof(W));
  const int64_t inputs = a.in * static_cast<int64_t>(sizeof(A));
  if (a.rows == 1) {
    blocks<kInOrder, in_order, W, A>(a);
  } else if (weights <= kNearBytes && inputs <= kNearBytes / 2) {
    blocks<kOutputs, near, W, A>(a);
  } else {
    blocks<kOutputs, far, W, A>(a);
  }
}

}  // namespace

void decode_linear(const DecodeLinear& a) {
  if (a.rows == 0) return;
  with_storage(a.weight_storage, [&](auto element) { run<decltype(element)>(a); });
}

}  // namespace mmkernels::MMK_ISA_NS
