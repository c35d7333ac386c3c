// What the attention kernels share: rows of queries, which keys they may see, products of live tiles only, exp2.
//
// A tile is kQueryTile query rows by kKeyTile keys.  Scores are stored as [key][query], so that lanes run over queries:
// the softmax then needs no sum or maximum across lanes, and the same matrix is the left factor of P V.
#pragma once

#include "common/arena.h"
#include "common/parallel.h"
#include "common/vec_math.h"
#include "cpu/mma_attention.h"
#include "cpu/ssd_tile.h"
#include "cpu/upcoming.h"

namespace mmkernels::MMK_ISA_NS {
namespace {

// 96 queries are whole vectors and whole register tiles (of 6 and of 8 rows) at every level; scores of 96 x 64 floats
// fit L1 beside what multiplies them.
inline constexpr int64_t kQueryTile = 96;
inline constexpr int64_t kKeyTile = 64;
// Keys packed at once: with headdim 128, 2 x 128 KiB of the second-level cache.
inline constexpr int64_t kKeyBlock = 256;

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

MMK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MMK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MMK_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) { return most(low, least(value, high)); }

template <class T> MMK_INLINE const T* at(const AttentionIn& in, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(in.data) + batch * in.batch + token * in.token + head * in.head;
}

// ---- 2^x -----------------------------------------------------------------------------------------------------------

// 2^x for x <= 88, of a softmax: 0 below -100 (a share of 1e-30 changes no sum that holds a 1, and subnormal numbers
// are slow on some processors); NaN stays NaN.  2^r = 1 + r Q(r) for |r| <= 1/2, relative error of the fit 9e-8.
MMK_INLINE Vec<float> power_of_two(Vec<float> x) {
  using V = Vec<float>;
  const V moved = x + V(0x1.8p23f);  // the nearest integer n, in the last bits
  const V r = x - (moved - V(0x1.8p23f));
  V q = fma(V(0x1.5bba14p-10f), r, V(0x1.3cea88p-7f));
  q = fma(q, r, V(0x1.c6b752p-5f));
  q = fma(q, r, V(0x1.ebf9bcp-3f));
  q = fma(q, r, V(0x1.62e42ap-1f));
  q = fma(q, r, V(1.0f));
  const Words scaled = bit_cast<Words>(q.raw) + (bit_cast<Words>(moved.raw) << 23);
  return select<float>(x < V(-100.0f), V(), V(bit_cast<V::Raw>(scaled)));
}

MMK_INLINE Vec<double> power_of_two(Vec<double> x) {
  return by_lane(x, [](double value) { return __builtin_exp2(value); });
}

MMK_INLINE float log2_of(float x) { return __builtin_log2f(x); }
MMK_INLINE double log2_of(double x) { return __builtin_log2(x); }

// ---- tasks ---------------------------------------------------------------------------------------------------------

// Runs every task of a call on a Worker(arena, call) of its thread.
template <class Worker, class Call>
void for_tasks(const Call& a) {
  parallel_for(a.shares, 1, [&](int64_t begin, int64_t end) {
    Arena measure{nullptr};
    Worker(measure, a);
    Arena arena{static_cast<char*>(thread_scratch(measure.used))};
    Worker work(arena, a);
    for (int64_t i = a.share[begin]; i < a.share[end]; ++i) work.run(a.task[i]);
  });
}

// ---- products ------------------------------------------------------------------------------------------------------

// Which part of a product a block of rows needs: k in [from, to), vectors of columns in [first, last).
struct Part {
  int64_t from, to, first, last;

  // From terms along the depth to elements, those included that hold a term more at an end.
  template <class E> MMK_INLINE Part in_elements() const {
    return {from / Factor<E>::depth, depth_of<E>(to), first, last};
  }
};

template <class E, bool depth_dense, int R, int J>
MMK_INLINE void panel_tile(const Product<E>& p, int64_t row, int64_t first, const Part& part) {
  product_tile<E, R, J, depth_dense>(p, row, first * Vec<typename Factor<E>::Sum>::size, part.from, part.to);
}

template <class E, bool depth_dense, int R>
MMK_INLINE void panel_rows(const Product<E>& p, int64_t row, int64_t first, int64_t last, const Part& part) {
  switch (last - first) {
    case 1: return panel_tile<E, depth_dense, R, 1>(p, row, first, part);
    case 2: return panel_tile<E, depth_dense, R, 2>(p, row, first, part);
    default:
      if constexpr (kTileVectors == 4) {
        if (last - first == 3) return panel_tile<E, depth_dense, R, 3>(p, row, first, part);
        if constexpr (R <= 6) return panel_tile<E, depth_dense, R, 4>(p, row, first, part);
      }
  }
}

// Scores [key][query] of n keys, whose rows are `width` elements apart, and the turned queries [depth][query].
template <class E>
MMK_INLINE Product<E> scores_of(int64_t n, int64_t headdim, const E* keys, int64_t width, const E* queries,
                                typename Factor<E>::Sum* scores) {
  return {n, kQueryTile, depth_of<E>(headdim), keys, width, 1, queries, kQueryTile, scores, kQueryTile};
}

// p, of every block of rows the part (in elements) that part_of(row, rows) asks for; an empty depth leaves c as it was.
// between() is called after every block.
template <class E, bool depth_dense, class PartOf, class Between = Nothing>
void multiply_parts(const Product<E>& p, const PartOf& part_of, const Between& between = {}) {
  using A = typename Factor<E>::Sum;
  const int64_t vectors = padded<A>(p.columns) / Vec<A>::size;
  const int64_t panels = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t panel = 0, begin = 0; panel < panels; ++panel) {
    const int64_t end = begin + (vectors - begin + panels - panel - 1) / (panels - panel);  // evenly wide
    const bool tall = kTileVectors == 4 && end - begin <= 3;
    for (int64_t row = 0; row < p.rows;) {
      const int64_t left = p.rows - row;
      const int64_t rows = tall && left >= 8 ? 8 : left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const Part part = part_of(row, rows);
      const int64_t first = most(begin, part.first), last = least(end, part.last);
      if (part.from < part.to && first < last) {
        switch (rows) {
          case 8: panel_rows<E, depth_dense, 8>(p, row, first, last, part); break;
          case 6: panel_rows<E, depth_dense, 6>(p, row, first, last, part); break;
          case 4: panel_rows<E, depth_dense, 4>(p, row, first, last, part); break;
          case 2: panel_rows<E, depth_dense, 2>(p, row, first, last, part); break;
          default: panel_rows<E, depth_dense, 1>(p, row, first, last, part);
        }
        between();
      }
      row += rows;
    }
    begin = end;
  }
}

// ---- rows of queries -----------------------------------------------------------------------------------------------

// Up to kQueryTile rows of one element of the batch: the queries of the heads that share keys, head after head.
struct Rows96 {
  int64_t batch, count;
  int64_t head[kQueryTile], token[kQueryTile];
  int64_t start[kQueryTile], end[kQueryTile];        // the interval of keys; end <= start: none
  int64_t first_token, last_token;                   // over all rows
  int64_t first_start, last_start, first_end, last_end;  // over all rows; an empty one makes first_end 0

  // Rows `begin` .. `begin + n` of those of kv_head, counted head after head.
  void take(const Attention& a, int64_t b, int64_t kv_head, int64_t begin, int64_t n) {
    const int64_t group = a.heads / a.kv_heads;
    batch = b, count = n;
    first_token = first_start = first_end = INT64_MAX, last_token = last_start = last_end = 0;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t i = (begin + r) % a.qlen;
      head[r] = kv_head * group + (begin + r) / a.qlen, token[r] = i;
      start[r] = most(a.row_start[b * a.qlen + i], 0), end[r] = least(a.row_end[b * a.qlen + i], a.klen);
      first_token = least(first_token, i), last_token = most(last_token, i);
      if (end[r] <= start[r]) {
        start[r] = end[r] = first_end = 0;
        continue;
      }
      first_start = least(first_start, start[r]), last_start = most(last_start, start[r]);
      first_end = least(first_end, end[r]), last_end = most(last_end, end[r]);
    }
  }
};

// ---- the mask ------------------------------------------------------------------------------------------------------

// Which scores of a tile are live.  lo and hi of a row enclose its live keys, relative to the tile's first.
template <class A>
struct Mask {
  using V = Vec<A>;
  static constexpr int64_t kVectors = kQueryTile / V::size;

  const Attention* a;
  const AttentionRect* hits;  // the rectangles of the batch
  int64_t hit_count;
  bool full;
  int64_t keys, first_key;
  int64_t lo[kQueryTile], hi[kQueryTile];  // lo = keys, hi = 0: none
  int64_t vector_lo[kVectors], vector_hi[kVectors];

  // False if the tile of keys first .. first + n has no live score for these rows.
  bool open(const Attention& call, const Rows96& rows, int64_t first, int64_t n) {
    const bool live = any(call, rows, first, n);
    if (live) enclose(rows);
    return live;
  }

  // The same, without lo and hi.
  bool any(const Attention& call, const Rows96& rows, int64_t first, int64_t n) {
    a = &call, first_key = first, keys = n;
    hits = call.rects + call.rects_before[rows.batch];
    hit_count = call.rects_before[rows.batch + 1] - call.rects_before[rows.batch];
    full = rows.last_start <= first && rows.first_end >= first + n;
    bool live = rows.first_start < first + n && rows.last_end > first;
    for (int64_t i = 0; i < hit_count; ++i) {
      const AttentionRect& rect = hits[i];
      if (!touches(rect, rows)) continue;
      live = true;
      const bool all_rows = rect.q0 <= rows.first_token && rect.q1 > rows.last_token;
      full = full || (all_rows && rect.k0 <= first && rect.k1 >= first + n);
    }
    return live;
  }

  bool touches(const AttentionRect& rect, const Rows96& rows) const {
    const bool any_row = rect.q0 <= rows.last_token && rect.q1 > rows.first_token;
    return any_row && rect.k0 < first_key + keys && rect.k1 > first_key;
  }

  void enclose(const Rows96& rows) {
    for (int64_t r = 0; r < kQueryTile; ++r) {
      lo[r] = r < rows.count && full ? 0 : keys, hi[r] = r < rows.count && full ? keys : 0;
    }
    for (int64_t r = 0; r < rows.count && !full; ++r) widen(r, rows.start[r], rows.end[r]);
    for (int64_t i = 0; i < hit_count && !full; ++i) {
      if (!touches(hits[i], rows)) continue;
      for (int64_t r = 0; r < rows.count; ++r) {
        if (hits[i].q0 <= rows.token[r] && rows.token[r] < hits[i].q1) widen(r, hits[i].k0, hits[i].k1);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      vector_lo[v] = keys, vector_hi[v] = 0;
      for (int64_t r = v * V::size; r < (v + 1) * V::size; ++r) {
        vector_lo[v] = least(vector_lo[v], lo[r]), vector_hi[v] = most(vector_hi[v], hi[r]);
      }
    }
  }

  void widen(int64_t r, int64_t start, int64_t end) {
    const int64_t from = clamp(start - first_key, 0, keys), to = clamp(end - first_key, 0, keys);
    if (from < to) lo[r] = least(lo[r], from), hi[r] = most(hi[r], to);
  }

  // Scores of keys key .. key + n: the vectors of queries that need one of them.
  Part scores_part(int64_t key, int64_t n, int64_t depth) const {
    int64_t first = kVectors, last = 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      if (vector_lo[v] < key + n && vector_hi[v] > key) first = least(first, v), last = v + 1;
    }
    return {0, depth, first, last};
  }

  // Sums over keys for queries row .. row + n.
  Part keys_part(int64_t row, int64_t n) const {
    if (full) return {0, keys, 0, INT64_MAX};
    int64_t from = keys, to = 0;
    for (int64_t r = row; r < row + n; ++r) from = least(from, lo[r]), to = most(to, hi[r]);
    return {from, to, 0, INT64_MAX};
  }

  // Sums over queries for keys key .. key + n.
  Part queries_part(int64_t key, int64_t n, int64_t count) const {
    if (full) return {0, count, 0, INT64_MAX};
    int64_t from = count, to = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (lo[r] < key + n && hi[r] > key) from = least(from, r), to = r + 1;
    }
    return {from, to, 0, INT64_MAX};
  }

  // Makes the scores of vector v ready for a softmax: -inf where masked, between its first and last live key; 0 in the
  // other keys' rows.
  void apply(const Rows96& rows, int64_t v, A* scores) const {
    hide(rows, v, scores, -static_cast<A>(__builtin_inf()));
    clear_rest(v, scores);
  }

  // The first half of that, with the value that masked scores get.
  void hide(const Rows96& rows, int64_t v, A* scores, A masked) const {
    if (full) return;
    A* column = scores + v * V::size;
    const V none(masked);
    for_live(rows, v, [&](int64_t j, typename V::Bits keep) {
      A* score = column + j * kQueryTile;
      select<A>(keep, V::load(score), none).store(score);
    });
  }

  // And the second, of a factor whose depth runs over keys: products read whole rectangles around what is live.
  template <class E>
  void clear_rest(int64_t v, E* to) const {
    if (full) return;
    E* column = to + v * V::size;
    const auto clear = [&](int64_t row) { __builtin_memset(column + row * kQueryTile, 0, sizeof(V)); };
    for (int64_t row = 0; row < vector_lo[v] / Factor<E>::depth; ++row) clear(row);
    for (int64_t row = depth_of<E>(vector_hi[v]); row < depth_of<E>(keys); ++row) clear(row);
  }

  // change(row of scores, keep) for each key of vector v that encloses a live one: keep is all ones in live lanes.
  template <class Change>
  void for_live(const Rows96& rows, int64_t v, const Change& change) const {
    using Bits = typename V::Bits;
    A start[V::size], end[V::size];
    for (int64_t i = 0; i < V::size; ++i) {
      const int64_t r = v * V::size + i;
      start[i] = r < rows.count ? static_cast<A>(clamp(rows.start[r] - first_key, 0, keys)) : A(0);
      end[i] = r < rows.count ? static_cast<A>(clamp(rows.end[r] - first_key, 0, keys)) : A(0);
    }
    const V from = V::load(start), to = V::load(end);
    Bits added[kKeyTile] = {};
    for (int64_t i = 0; i < hit_count; ++i) {
      if (touches(hits[i], rows)) add_rect(hits[i], rows, v, added);
    }
    for (int64_t j = vector_lo[v]; j < vector_hi[v]; ++j) {
      const V key(static_cast<A>(j));
      change(j, (~(key < from) & (key < to)) | added[j]);
    }
  }

  void add_rect(const AttentionRect& rect, const Rows96& rows, int64_t v, typename V::Bits* added) const {
    A inside[V::size];
    for (int64_t i = 0; i < V::size; ++i) {
      const int64_t r = v * V::size + i;
      inside[i] = r < rows.count && rect.q0 <= rows.token[r] && rows.token[r] < rect.q1 ? A(1) : A(0);
    }
    const typename V::Bits lanes = V::load(inside) > V();
    const int64_t end = clamp(rect.k1 - first_key, 0, keys);
    for (int64_t j = clamp(rect.k0 - first_key, 0, keys); j < end; ++j) added[j] |= lanes;
  }
};

// work(j, j % 4) for lo <= j < hi: four independent sums hide the latency of one.
template <class Work>
MMK_INLINE void for_fours(int64_t lo, int64_t hi, const Work& work) {
  int64_t j = lo;
  for (; j + 4 <= hi; j += 4) work(j, 0), work(j + 1, 1), work(j + 2, 2), work(j + 3, 3);
  for (; j < hi; ++j) work(j, 0);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// Rows of consecutive numbers into rows `width` elements apart, padded with zeros to whole vectors.
template <class E, class T>
void pack_rows(const T* from, int64_t step, int64_t rows, int64_t dim, E* to, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, from += step, to += width) pack_row(from, dim, to);
}

// to[c][r] = factor row(r)[c] for r < rows, 0 up to the next whole vector.  Rows of `to` are kQueryTile apart.
template <class A, class Row>
void pack_transposed(int64_t rows, int64_t dim, A factor, A* to, const Row& row) {
  using V = Vec<A>;
  const V by(factor);
  for (int64_t r = 0; r < rows; r += V::size) {
    const int64_t height = least(rows - r, V::size);
    for_lanes<V>(dim, [&](int64_t c, auto lanes) {
      V square[V::size];
      for (int64_t i = 0; i < height; ++i) square[i] = V::load(row(r + i) + c, lanes) * by;
      transpose_square(square);
      const int64_t columns = least(dim - c, V::size);
      for (int64_t i = 0; i < columns; ++i) square[i].store(to + (c + i) * kQueryTile + r);
    });
  }
}

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
