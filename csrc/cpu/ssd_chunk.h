// What forward and backward of the state-space scan share: scratch memory, step sizes and decays, packing, C B^T.
//
// One chunk of T tokens and one head, with s the sums of the log-decays a = A dt from the chunk's start (inclusive):
//   y_i = e^{s_i} R C_i + sum_{j <= i} (B_j . C_i) e^{s_i - s_j} dt_j x_j + D x_i,      R the state that enters
//   R' = e^{s_T} R + sum_j e^{s_T - s_j} dt_j x_j B_j^T                                 and the one that leaves
// (Dao and Gu 2024, section 6).  Pairs of tokens are stored as [j][i], j the earlier: lanes run over i, and the same
// matrix serves as left factor in both directions.
#pragma once

#include "common/arena.h"
#include "common/parallel.h"
#include "common/vec_math.h"
#include "cpu/ssd.h"
#include "cpu/ssd_tile.h"
#include "cpu/upcoming.h"

namespace mmkernels::MMK_ISA_NS {
namespace {

// A task: some heads of one group of one row.
struct Unit {
  int64_t index, group, block, first_head, heads;
  const SsdRow* row;
  Unit(const Ssd& a, int64_t number) {
    const int64_t per_group = a.heads / a.groups;
    block = number % a.head_blocks;
    group = number / a.head_blocks % a.groups;
    index = number / a.head_blocks / a.groups;
    row = a.row + index;
    first_head = group * per_group + block * per_group / a.head_blocks;
    heads = group * per_group + (block + 1) * per_group / a.head_blocks - first_head;
  }
};

inline int64_t unit_count(const Ssd& a) { return a.rows * a.groups * a.head_blocks; }

// Tasks that together are worth a thread: some 2 M multiply-adds.
inline int64_t unit_grain(const Ssd& a) {
  const int64_t tokens = a.rows > 0 ? a.most_chunks * a.chunk_tokens : 1;
  const int64_t states = a.most_chunks > 1 ? a.headdim * a.dstate : 0;
  const int64_t work = tokens * (a.heads / a.groups / a.head_blocks + 1) * (states + a.chunk_tokens * (a.headdim + a.dstate));
  const int64_t grain = 2000000 / (work > 0 ? work : 1);
  return grain > 0 ? grain : 1;
}

// The tokens of a chunk, in scan order.
struct Walk {
  const int64_t* order = nullptr;
  int64_t first = 0, step = 1;
  Walk() = default;
  Walk(const Ssd& a, const SsdChunk& chunk)
      : order(a.order == nullptr ? nullptr : a.order + chunk.token), first(chunk.token), step(a.direction) {}
  MMK_INLINE int64_t operator[](int64_t t) const { return order == nullptr ? first + t * step : order[t]; }
};

// Token 0 of a head; token t lies t in.token further on.
template <class T> MMK_INLINE const T* head_of(const SsdIn& in, int64_t batch, int64_t head) {
  return static_cast<const T*>(in.data) + batch * in.batch + head * in.head;
}

// Step sizes and decays of one chunk and head.  Rows of `tokens` padded to whole vectors.
template <class A>
struct Decays {
  A *pre, *dt;      // the step size before and after softplus and clamp
  A *high, *low;    // s = high + low: differences of s are exact to float's rounding of the difference itself
  A *grown, *left;  // e^{s_i}, e^{s_T - s_i}
  A all;            // e^{s_T}
  A *until, *after; // factor()

  Decays(Arena& arena, int64_t tokens)
      : pre(arena.take<A>(tokens)), dt(arena.take<A>(tokens)), high(arena.take<A>(tokens)), low(arena.take<A>(tokens)),
        grown(arena.take<A>(tokens)), left(arena.take<A>(tokens)), until(arena.take<A>(tokens)),
        after(arena.take<A>(tokens / Vec<A>::size * tokens)) {}

  void compute(const Ssd& a, const SsdChunk& chunk, int64_t batch, int64_t head) {
    using V = Vec<A>;
    const A bias = a.dt_bias == nullptr ? A(0) : static_cast<const A*>(a.dt_bias)[head];
    const A* from = head_of<A>(a.dt, batch, head);
    const Walk token(a, chunk);
    const int64_t count = chunk.length, whole = padded<A>(count);
    for (int64_t i = 0; i < count; ++i) pre[i] = from[token[i] * a.dt.token] + bias;
    for (int64_t i = count; i < whole; ++i) pre[i] = A(0);
    for (int64_t i = 0; i < whole; i += V::size) {
      const V v = V::load(pre + i), d = a.softplus ? softplus(v) : v;
      max(V(A(a.dt_low)), min(V(A(a.dt_high)), d)).store(dt + i);
    }
    // In double, whatever A: cancellation in s_i - s_j then costs nothing.  e^-1024 is 0 already; the limit keeps sums
    // finite where A dt overflows.
    const double rate = static_cast<double>(static_cast<const A*>(a.A)[head]);
    double sum = 0;
    for (int64_t i = 0; i < whole; ++i) {
      const double fall = i < count ? rate * static_cast<double>(dt[i]) : 0.0;
      sum += fall < -1024.0 ? -1024.0 : fall;
      high[i] = static_cast<A>(sum);
      low[i] = static_cast<A>(sum - static_cast<double>(high[i]));
    }
    const V last_high(high[whole - 1]), last_low(low[whole - 1]);
    for (int64_t i = 0; i < whole; i += V::size) {
      const V h = V::load(high + i), l = V::load(low + i);
      exp(min(V(), h + l)).store(grown + i);
      exp(min(V(), (last_high - h) + (last_low - l))).store(left + i);
    }
    all = grown[whole - 1];
  }

  // e^{s_i - s_j} dt_j = until[j] after[v][i] for tokens i behind the vector v of j, with p that vector's last token:
  // until_j = e^{s_p - s_j} dt_j, after_i = e^{s_i - s_p}.  Neither exponent is positive, and exponentials are taken of
  // vectors in place of pairs.  `after` has rows of `row` elements, one a vector.
  void factor(int64_t count, int64_t row) const {
    using V = Vec<A>;
    for (int64_t first = 0; first < count; first += V::size) {
      const int64_t last = first + V::size - 1;
      const V difference = (V(high[last]) - V::load(high + first)) + (V(low[last]) - V::load(low + first));
      (exp(min(V(), difference)) * V::load(dt + first)).store(until + first);
      for (int64_t i = last + 1; i < count; i += V::size) between(last, i).store(after + first / V::size * row + i);
    }
  }

  // e^{s_i - s_j} for the lanes i, i + 1, ...
  MMK_INLINE Vec<A> between(int64_t j, int64_t i) const {
    using V = Vec<A>;
    const V difference = (V::load(high + i) - V(high[j])) + (V::load(low + i) - V(low[j]));
    return exp(min(V(), difference));
  }
};

template <class A> MMK_INLINE Vec<A> lane_numbers() {
  A lanes[Vec<A>::size];
  for (int i = 0; i < Vec<A>::size; ++i) lanes[i] = A(i);
  return Vec<A>::load(lanes);
}

// value in the lanes first + lane >= at, 0 in the others.
template <class A> MMK_INLINE Vec<A> from_lane(int64_t at, int64_t first, Vec<A> value) {
  return select<A>(lane_numbers<A>() > Vec<A>(A(at - first) - A(0.5)), value, Vec<A>());
}

// The first vector of row j of a matrix of pairs that a product may read: its tile may begin kTileRows - 1 rows earlier.
template <class A> MMK_INLINE int64_t first_read(int64_t j) {
  const int64_t earliest = j - (kTileRows - 1);
  return earliest < 0 ? 0 : earliest / Vec<A>::size * Vec<A>::size;
}

// `tokens` rows of `width` elements, `step` apart, widened and padded with zeros.
template <class A, class T>
MMK_INLINE void pack(const T* from, int64_t step, int64_t tokens, int64_t width, A* to, int64_t to_row) {
  for (int64_t t = 0; t < tokens; ++t, from += step, to += to_row) pack_row(from, width, to);
}

// The tokens of a chunk, of one head or group.
template <class E, class T>
MMK_INLINE void pack(const SsdIn& in, const T* from, const Walk& token, int64_t tokens, int64_t width, E* to, int64_t to_row) {
  for (int64_t t = 0; t < tokens; ++t, to += to_row) pack_row(from + token[t] * in.token, width, to);
}

// The same as a factor whose depth runs over the tokens.
template <class E, class T>
MMK_INLINE void pack_tokens(const SsdIn& in, const T* from, const Walk& token, int64_t tokens, int64_t width, E* to,
                            int64_t to_row) {
  for (int64_t t = 0; t < tokens; t += 2) {
    const T* odd = t + 1 < tokens ? from + token[t + 1] * in.token : nullptr;
    put_rows(to, to_row, t, from + token[t] * in.token, odd, width);
  }
}

MMK_INLINE int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

// B and C of one chunk and group as factors of products, and all the products B_j . C_i with i >= j.
template <class E>
struct Keys {
  using A = typename Factor<E>::Sum;

  int64_t row, pair_row;  // numbers in a row of B and C; in a row of pairs of tokens
  int64_t elements;       // of a row of B and C
  E *B, *C, *transposed;  // rows of tokens, the depth along them; C turned
  E* B_tokens;            // the depth over tokens.  For numbers that is B.
  A* scores;

  Keys(Arena& arena, const Ssd& a)
      : row(padded<A>(a.dstate)), pair_row(padded<A>(a.chunk_tokens)), elements(row / Factor<E>::depth),
        B(arena.take<E>(a.chunk_tokens * elements)), C(arena.take<E>(a.chunk_tokens * elements)),
        transposed(arena.take<E>(elements * pair_row)),
        B_tokens(Factor<E>::depth == 1 ? B : arena.take<E>(depth_of<E>(a.chunk_tokens) * row)),
        scores(arena.take<A>(a.chunk_tokens * pair_row)) {}

  template <class T>
  void load_B(const Ssd& a, const SsdChunk& chunk, int64_t batch, int64_t group) {
    pack(a.B, head_of<T>(a.B, batch, group), Walk(a, chunk), chunk.length, a.dstate, B, elements);
  }
  template <class T>
  void load(const Ssd& a, const SsdChunk& chunk, int64_t batch, int64_t group) {
    load_B<T>(a, chunk, batch, group);
    if constexpr (Factor<E>::depth > 1) {
      pack_tokens(a.B, head_of<T>(a.B, batch, group), Walk(a, chunk), chunk.length, a.dstate, B_tokens, row);
    }
    pack(a.C, head_of<T>(a.C, batch, group), Walk(a, chunk), chunk.length, a.dstate, C, elements);
    const int64_t depth = depth_of<E>(a.dstate);
    transpose(C, elements, chunk.length, depth, transposed, pair_row);
    Product<E> p{chunk.length, chunk.length, depth, B, elements, 1, transposed, pair_row, scores, pair_row};
    p.upper = true;
    multiply(p);
  }
};

// A state as the caller keeps it, (headdim, dstate), of row `index`.
template <class A> MMK_INLINE const A* state_of(const Ssd& a, const void* states, int64_t index, int64_t head) {
  return static_cast<const A*>(states) + (index * a.heads + head) * a.headdim * a.dstate;
}
template <class A> MMK_INLINE A* state_of(const Ssd& a, void* states, int64_t index, int64_t head) {
  return static_cast<A*>(states) + (index * a.heads + head) * a.headdim * a.dstate;
}

// Elements of an output (batch, seqlen, heads, width) before this token and head.
MMK_INLINE int64_t dense(const Ssd& a, int64_t batch, int64_t token, int64_t head, int64_t heads, int64_t width) {
  return ((batch * a.batch_tokens + token) * heads + head) * width;
}

template <class T> MMK_INLINE void clear(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
