// Matrix pieces of the state-space scan and of attention: factors, products in register tiles, transposes, sums of rows.
//
// Matrices live in scratch memory with rows padded to whole vectors, so that nothing here sees a partial vector.
#pragma once

#include "common/rows.h"
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {
namespace {

// Sums of a register tile: 6 x 4 vectors where there are 32 registers (24 sums, 4 of b, and a broadcast operand that
// AVX512 folds into the multiply-add), 6 x 2 where there are 16.  4 sums would hide the latency of a multiply-add on
// Zen 4 and 8 on Intel; the rest is there to load less than is multiplied: 10 loads for 24 multiply-adds.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kTileVectors = 4;
#else
inline constexpr int kTileVectors = 2;
#endif
inline constexpr int kTileRows = 6;

template <int N> struct Constant { static constexpr int value = N; };

template <class A> MMK_INLINE int64_t padded(int64_t n) { return (n + Vec<A>::size - 1) / Vec<A>::size * Vec<A>::size; }

// ---- factors of products ----------------------------------------------------------------------------------------------

// What the factors of a product consist of: numbers, multiplied and summed in their own type ...
template <class E> struct Factor {
  using Sum = E;
  using Vector = Vec<E>;
  static constexpr int64_t depth = 1;  // terms in a factor's element
  static MMK_INLINE Vector load(const E* from) { return Vector::load(from); }
  static MMK_INLINE Vector spread(E value) { return Vector(value); }
  static MMK_INLINE Vec<E> multiply_add(Vector a, Vector b, Vec<E> sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// ... or two bfloat16 numbers, neighbours along the depth: one instruction adds both of their products to a float.  Their
// rounding is the only one; subnormal numbers count as zero.
struct Bf16Pair { uint32_t bits; };

template <> struct Factor<Bf16Pair> {
  using Sum = float;
  using Vector = Words;
  static constexpr int64_t depth = 2;
  static MMK_INLINE Vector load(const Bf16Pair* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    return words;
  }
  static MMK_INLINE Vector spread(Bf16Pair value) { return Words{} + value.bits; }
  static MMK_INLINE Vec<float> multiply_add(Vector a, Vector b, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum.raw, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};
#endif

// What tensors stored as T are multiplied as.
#if defined(__AVX512BF16__)
template <class T> using Element = Bf16Pair;
#else
template <class T> using Element = Arithmetic<T>;
#endif

template <class E> MMK_INLINE int64_t depth_of(int64_t terms) { return (terms + Factor<E>::depth - 1) / Factor<E>::depth; }

// Rows k and k + 1 (k even) of a factor whose depth runs over rows, from lane i on.  Such a factor has an even number of
// rows, the last one zero if need be.
template <class A> MMK_INLINE void put(A* to, int64_t row, int64_t k, int64_t i, Vec<A> even, Vec<A> odd) {
  even.store(to + k * row + i);
  odd.store(to + (k + 1) * row + i);
}
#if defined(__AVX512BF16__)
MMK_INLINE void put(Bf16Pair* to, int64_t row, int64_t k, int64_t i, Vec<float> even, Vec<float> odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.raw, even.raw));
  const __m512i pairs = _mm512_permutexvar_epi16(order, halves);
  __builtin_memcpy(to + k / 2 * row + i, &pairs, sizeof(pairs));
}
#endif

// Row k of a factor whose depth runs along rows, from lane i on; rows are `row` elements apart.
template <class A> MMK_INLINE void put_along(A* to, int64_t row, int64_t k, int64_t i, Vec<A> values) {
  values.store(to + k * row + i);
}
#if defined(__AVX512BF16__)
MMK_INLINE void put_along(Bf16Pair* to, int64_t row, int64_t k, int64_t i, Vec<float> values) {
  const __m256bh narrowed = _mm512_cvtneps_pbh(values.raw);
  __builtin_memcpy(to + k * row + i / 2, &narrowed, sizeof(narrowed));
}
#endif

// put() of numbers that were stored as T: what is bfloat16 already needs no rounding.
template <class T, class E, class A>
MMK_INLINE void put_stored(E* to, int64_t row, int64_t k, int64_t i, Vec<A> even, Vec<A> odd) {
  if constexpr (Factor<E>::depth == 2 && sizeof(T) == 2) {
    const Words pairs = bit_cast<Words>(even.raw) >> 16 | bit_cast<Words>(odd.raw);
    __builtin_memcpy(to + k / 2 * row + i, &pairs, sizeof(pairs));
  } else {
    put(to, row, k, i, even, odd);
  }
}

// A matrix of numbers as a factor whose depth runs over its rows; pairs are made in `scratch`.
template <class E, class A>
const E* factor_of(const A* from, int64_t rows, int64_t row, [[maybe_unused]] E* scratch) {
  if constexpr (Factor<E>::depth == 1) {
    return from;
  } else {
    using V = Vec<A>;
    for (int64_t k = 0; k < rows; k += 2) {
      const A *even = from + k * row, *odd = k + 1 < rows ? even + row : nullptr;
      for (int64_t i = 0; i < row; i += V::size) {
        put(scratch, row, k, i, V::load(even + i), odd == nullptr ? V() : V::load(odd + i));
      }
    }
    return scratch;
  }
}

// Whole rows of `width` numbers, padded with zeros to whole vectors, as rows k and k + 1 of such a factor; null is a row of
// zeros.
template <class E, class T>
MMK_INLINE void put_rows(E* to, int64_t row, int64_t k, const T* even, const T* odd, int64_t width) {
  using V = Vec<typename Factor<E>::Sum>;
  for_lanes<V>(width, [&](int64_t i, auto lanes) {
    const V first = even == nullptr ? V() : V::load(even + i, lanes);
    put_stored<T>(to, row, k, i, first, odd == nullptr ? V() : V::load(odd + i, lanes));
  });
}

// `width` numbers to a row of a factor whose depth runs along rows, padded with zeros to whole vectors.
template <class A, class T>
MMK_INLINE void pack_row(const T* from, int64_t width, A* to) {
  for_lanes<Vec<A>>(width, [&](int64_t i, auto lanes) { Vec<A>::load(from + i, lanes).store(to + i); });
}
#if defined(__AVX512BF16__)
// ... of pairs, padded with zeros to as many as a vector has numbers.
MMK_INLINE void pack_row(const bf16* from, int64_t width, Bf16Pair* to) {
  const size_t bytes = static_cast<size_t>(width) * sizeof(bf16);
  const size_t all = static_cast<size_t>(padded<float>(width)) * sizeof(bf16);
  __builtin_memcpy(to, from, bytes);
  __builtin_memset(reinterpret_cast<char*>(to) + bytes, 0, all - bytes);
}
#endif

// ---- products ---------------------------------------------------------------------------------------------------------

enum class Depth { full, to_row, from_row };  // k in [0, depth), [0, row], [row, depth)

// c[r][j] = start[r][j] scale[r] + sum over k of a(r, k) b[k][j], with a(r, k) = a[r a_row + k a_depth].
// a_row or a_depth is 1.  c may be start.  With Depth::to_row and from_row a is 0 outside, at least within a tile's rows.
template <class E>
struct Product {
  using A = typename Factor<E>::Sum;
  int64_t rows, columns, depth;  // columns are rounded up to whole vectors; elements of E along the depth
  const E* a;
  int64_t a_row, a_depth;
  const E* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
  const A* start = nullptr;  // null: 0; rows c_row apart
  const A* scale = nullptr;  // null: 1
  int64_t scale_row = 0;     // 1: one scale a row, 0: the same for all
  Depth limit = Depth::full;
  bool upper = false;  // only the vectors of c that hold some j >= r
};

template <class E, int R, int J, bool depth_dense>
void product_tile(const Product<E>& p, int64_t row, int64_t column, int64_t from, int64_t to) {
  using F = Factor<E>;
  using A = typename F::Sum;
  using V = Vec<A>;
  V sums[R][J];
  const int64_t a_row = depth_dense ? p.a_row : 1, a_depth = depth_dense ? 1 : p.a_depth, b_row = p.b_row;
  const E* a = p.a + row * a_row + from * a_depth;
  const E* b = p.b + from * b_row + column;
  for (int64_t k = from; k < to; ++k, a += a_depth, b += b_row) {
    typename F::Vector right[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) right[j] = F::load(b + j * V::size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename F::Vector left = F::spread(a[r * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sums[r][j] = F::multiply_add(left, right[j], sums[r][j]);
    }
  }
  A* c = p.c + row * p.c_row + column;
  if (p.start == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sums[r][j].store(c + r * p.c_row + j * V::size);
    }
    return;
  }
  // Added last: a state that remembers thousands of tokens is rounded once a chunk, not once a token.
  const A* start = p.start + row * p.c_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const V scale(p.scale == nullptr ? A(1) : p.scale[(row + r) * p.scale_row]);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      fma(scale, V::load(start + r * p.c_row + j * V::size), sums[r][j]).store(c + r * p.c_row + j * V::size);
    }
  }
}

template <class E, int R>
MMK_INLINE void product_rows(const Product<E>& p, int64_t row, int64_t column, int64_t vectors) {
  const int64_t from = p.limit == Depth::from_row ? row / Factor<E>::depth : 0;
  const int64_t reach = p.limit == Depth::to_row ? depth_of<E>(row + R) : p.depth;
  const int64_t to = reach < p.depth ? reach : p.depth;
  const auto run = [&](auto width) {
    constexpr int J = decltype(width)::value;
    p.a_depth == 1 ? product_tile<E, R, J, true>(p, row, column, from, to)
                   : product_tile<E, R, J, false>(p, row, column, from, to);
  };
  switch (vectors) {
    case 1: return run(Constant<1>{});
    case 2: return run(Constant<2>{});
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return run(Constant<3>{});
    default: return run(Constant<4>{});
#endif
  }
}

struct Nothing {
  MMK_INLINE void operator()() const {}
};

// A tile's columns of b stay in L1 while its rows pass.  between() is called after every tile.
template <class E, class Between = Nothing>
void multiply(const Product<E>& p, const Between& between = {}) {
  using A = typename Factor<E>::Sum;
  constexpr int64_t size = Vec<A>::size;
  const int64_t vectors = padded<A>(p.columns) / size;
  for (int64_t first = 0; first < vectors; first += kTileVectors) {
    const int64_t last = first + kTileVectors < vectors ? first + kTileVectors : vectors;
    int64_t row = 0;
    while (row < p.rows) {
      const int64_t begin = p.upper && row / size > first ? row / size : first;
      if (begin >= last) break;
      const int64_t left = p.rows - row, column = begin * size, width = last - begin;
      if (left >= 6) {
        product_rows<E, 6>(p, row, column, width), row += 6;
      } else if (left >= 4) {
        product_rows<E, 4>(p, row, column, width), row += 4;
      } else if (left >= 2) {
        product_rows<E, 2>(p, row, column, width), row += 2;
      } else {
        product_rows<E, 1>(p, row, column, width), row += 1;
      }
      between();
    }
  }
}

// ---- transposes and sums ----------------------------------------------------------------------------------------------

// a0 b0 a1 b1 ..., the first half (low) or the second of it.
template <bool low, class A>
MMK_INLINE Vec<A> interleave(Vec<A> a, Vec<A> b) {
  constexpr int n = Vec<A>::size, o = low ? 0 : n / 2;
  if constexpr (n == 2) {
    return MMK_SHUFFLE(a.raw, b.raw, o, n + o);
  } else if constexpr (n == 4) {
    return MMK_SHUFFLE(a.raw, b.raw, o, n + o, o + 1, n + o + 1);
  } else if constexpr (n == 8) {
    return MMK_SHUFFLE(a.raw, b.raw, o, n + o, o + 1, n + o + 1, o + 2, n + o + 2, o + 3, n + o + 3);
  } else {
    return MMK_SHUFFLE(a.raw, b.raw, o, n + o, o + 1, n + o + 1, o + 2, n + o + 2, o + 3, n + o + 3, o + 4, n + o + 4,
                       o + 5, n + o + 5, o + 6, n + o + 6, o + 7, n + o + 7);
  }
}

// A square of size x size: log2(size) rounds of riffling the rows transpose it.
template <class A>
MMK_INLINE void transpose_square(Vec<A>* rows) {
  constexpr int n = Vec<A>::size;
  Vec<A> other[n];
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      other[2 * i] = interleave<true>(rows[i], rows[i + n / 2]);
      other[2 * i + 1] = interleave<false>(rows[i], rows[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = other[i];
  }
}

// to[c][r] = from[r][c].  `from` has dense unpadded rows, `to` rows padded with zeros to whole vectors.
template <class A>
void transpose(const A* from, int64_t from_row, int64_t rows, int64_t columns, A* to, int64_t to_row) {
  using V = Vec<A>;
  for (int64_t c = 0; c < columns; c += V::size) {
    const int width = static_cast<int>(columns - c < V::size ? columns - c : V::size);
    for (int64_t r = 0; r < rows; r += V::size) {
      V square[V::size];
      const int64_t height = rows - r < V::size ? rows - r : V::size;
      for (int i = 0; i < height; ++i) {
        const A* row = from + (r + i) * from_row + c;
        square[i] = width == V::size ? V::load(row) : V::load(row, width);
      }
      transpose_square(square);
      for (int i = 0; i < width; ++i) square[i].store(to + (c + i) * to_row + r);
    }
  }
}
#if defined(__AVX512BF16__)
MMK_INLINE void transpose(const Bf16Pair* from, int64_t from_row, int64_t rows, int64_t columns, Bf16Pair* to,
                          int64_t to_row) {
  transpose(reinterpret_cast<const float*>(from), from_row, rows, columns, reinterpret_cast<float*>(to), to_row);
}
#endif

// The same into dense unpadded rows of `to`.
template <class A>
void transpose_dense(const A* from, int64_t from_row, int64_t rows, int64_t columns, A* to, int64_t to_row) {
  using V = Vec<A>;
  for (int64_t c = 0; c < columns; c += V::size) {
    const int64_t width = columns - c < V::size ? columns - c : V::size;
    for (int64_t r = 0; r < rows; r += V::size) {
      V square[V::size];
      const int height = static_cast<int>(rows - r < V::size ? rows - r : V::size);
      for (int i = 0; i < height; ++i) square[i] = V::load(from + (r + i) * from_row + c);
      transpose_square(square);
      for (int i = 0; i < width; ++i) {
        A* out = to + (c + i) * to_row + r;
        height == V::size ? square[i].store(out) : square[i].store(out, height);
      }
    }
  }
}

// Lane i of the result is the sum of all lanes of rows[i]: a tree of riffles and additions.
template <class A>
MMK_INLINE Vec<A> sum_each(Vec<A>* rows) {
#pragma GCC unroll 4
  for (int half = Vec<A>::size / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      rows[i] = interleave<true>(rows[i], rows[i + half]) + interleave<false>(rows[i], rows[i + half]);
    }
  }
  return rows[0];
}

// sums[r] = the sum of the lanes of row(r), 0 <= r < rows; sums is padded.
template <class A, class Row>
MMK_INLINE void sum_rows(int64_t rows, A* sums, const Row& row) {
  using V = Vec<A>;
  for (int64_t r = 0; r < rows; r += V::size) {
    V part[V::size];
    for (int64_t i = 0; i < V::size && r + i < rows; ++i) part[i] = row(r + i);
    sum_each(part).store(sums + r);
  }
}

// The lanes of a row of `columns` elements multiplied by those of another.
template <class A>
MMK_INLINE Vec<A> row_product(const A* a, const A* b, int64_t columns) {
  Vec<A> sum;
  for (int64_t i = 0; i < columns; i += Vec<A>::size) sum = fma(Vec<A>::load(a + i), Vec<A>::load(b + i), sum);
  return sum;
}

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
