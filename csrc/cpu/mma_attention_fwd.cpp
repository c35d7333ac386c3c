// Forward of attention over live tiles, by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A task owns some query rows of the heads that share keys, and walks the keys in blocks.  A block's tiles are packed
// when first needed, as [key][headdim], and serve all of the task's queries.  Per tile, with s = q k^T scale log2(e):
//   m' = max(m, max s),  p = 2^(s - m'),  l' = 2^(m - m') l + sum p,  o' = 2^(m - m') o + p v
// Pairs of bfloat16 numbers are pairs along headdim in q and k, and of keys in p and v.  p alone is rounded to them,
// after it is summed.
#include "cpu/mma_attention_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

template <class T>
struct Forward {
  using A = Arithmetic<T>;
  using E = Element<T>;
  using V = Vec<A>;
  static constexpr bool kPairs = Factor<E>::depth == 2;

  const AttentionForward& a;
  int64_t width;     // numbers in a padded row of headdim
  int64_t elements;  // and elements: of a row of keys, and of a key's share of the rows of values
  E *keys, *values, *queries;
  E* straight_queries;  // pairs are made along rows, and then turned
  A* scores;            // and p as a factor in their place: it is never ahead of the scores it is made of
  A *out, *top, *total, *decay;
  Rows96* rows;
  Mask<A>* mask;
  int64_t seen_from, seen_to;  // enclose what rows of the task see
  bool packed[kKeyBlock / kKeyTile];
  Upcoming upcoming;

  Forward(Arena& arena, const AttentionForward& call)
      : a(call), width(padded<A>(a.headdim)), elements(width / Factor<E>::depth), upcoming(arena, 2 * kKeyTile) {
    const int64_t block = least(kKeyBlock, (a.klen + kKeyTile - 1) / kKeyTile * kKeyTile);
    const int64_t held = (a.most_rows + kQueryTile - 1) / kQueryTile * kQueryTile;
    keys = arena.take<E>(block * elements), values = arena.take<E>(block * elements);
    queries = arena.take<E>(depth_of<E>(a.headdim) * kQueryTile);
    straight_queries = arena.take<E>(kPairs ? kQueryTile * elements : 0);
    scores = arena.take<A>(kKeyTile * kQueryTile);
    out = arena.take<A>(held * width), top = arena.take<A>(held), total = arena.take<A>(held);
    decay = arena.take<A>(kQueryTile);
    rows = arena.take<Rows96>(1), mask = arena.take<Mask<A>>(1);
  }

  void run(const AttentionTask& task) {
    for (int64_t r = 0; r < (task.rows + kQueryTile - 1) / kQueryTile * kQueryTile; ++r) {
      top[r] = -static_cast<A>(__builtin_inf()), total[r] = 0;
    }
    for (int64_t i = 0; i < task.rows * width; i += V::size) V().store(out + i);
    if constexpr (kPairs) find_seen(task);
    for (int64_t block = task.first_key; block < task.last_key; block += kKeyBlock) {
      const int64_t end = least(block + kKeyBlock, task.last_key);
      for (bool& done : packed) done = false;
      for (int64_t r = 0; r < task.rows; r += kQueryTile) {
        rows->take(a, task.batch, task.kv_head, task.begin + r, least(kQueryTile, task.rows - r));
        one_tile(task, r, block, end);
      }
    }
    for (int64_t r = 0; r < task.rows; ++r) finish(task, r);
  }

  // All keys block .. end for the queries in `rows`, the task's from r on.
  void one_tile(const AttentionTask& task, int64_t r, int64_t block, int64_t end) {
    bool loaded = false;
    for (int64_t key = block; key < end; key += kKeyTile) {
      const int64_t n = least(kKeyTile, end - key), offset = (key - block) * elements;
      if (!mask->open(a, *rows, key, n)) continue;
      if (!loaded) load_queries(), loaded = true;
      bool& done = packed[(key - block) / kKeyTile];
      if (!done) {
        pack_rows(at<T>(a.k, task.batch, key, task.kv_head), a.k.token, n, a.headdim, keys + offset, elements);
        pack_values(task, key, n, values + offset);
        done = true;
      }
      look_ahead(task, r, block, key + kKeyTile, end);
      step(n, keys + offset, values + offset, out + r * width, top + r, total + r);
    }
  }

  // What is read once the keys before `key` are done: keys that are not packed yet, or the next queries, or the next
  // block.  Rows are too short and too far apart for the processor to guess.
  void look_ahead(const AttentionTask& task, int64_t r, int64_t block, int64_t key, int64_t end) {
    upcoming.clear();
    const int64_t bytes = a.headdim * static_cast<int64_t>(sizeof(T)), next = r + kQueryTile;
    if (key >= end && next < task.rows) {
      for (int64_t i = next; i < least(next + kQueryTile, task.rows); ++i) {
        const int64_t row = task.begin + i, head = task.kv_head * (a.heads / a.kv_heads) + row / a.qlen;
        upcoming.read(at<T>(a.q, task.batch, row % a.qlen, head), bytes);
      }
      return;
    }
    if (key < end && packed[(key - block) / kKeyTile]) return;
    for (int64_t i = key; i < least(key + kKeyTile, task.last_key); ++i) {
      upcoming.read(at<T>(a.k, task.batch, i, task.kv_head), bytes);
      upcoming.read(at<T>(a.v, task.batch, i, task.kv_head), bytes);
    }
  }

  // Of the first and last pair of keys half may be seen by nobody: there may be anything, NaN included, which must not
  // even be multiplied by 0.
  void find_seen(const AttentionTask& task) {
    seen_from = task.last_key, seen_to = task.first_key;
    for (int64_t r = 0; r < task.rows; r += kQueryTile) {
      rows->take(a, task.batch, task.kv_head, task.begin + r, least(kQueryTile, task.rows - r));
      seen_from = least(seen_from, rows->first_start), seen_to = most(seen_to, rows->last_end);
    }
    for (int64_t i = a.rects_before[task.batch]; i < a.rects_before[task.batch + 1]; ++i) {
      seen_from = least(seen_from, a.rects[i].k0), seen_to = most(seen_to, a.rects[i].k1);
    }
  }

  void pack_values(const AttentionTask& task, int64_t key, int64_t n, E* to) const {
    if constexpr (kPairs) {
      const auto value = [&](int64_t j) {
        const bool seen = j < n && seen_from <= key + j && key + j < seen_to;
        return seen ? at<T>(a.v, task.batch, key + j, task.kv_head) : nullptr;
      };
      for (int64_t j = 0; j < n; j += 2) put_rows(to, width, j, value(j), value(j + 1), a.headdim);
    } else {
      pack_rows(at<T>(a.v, task.batch, key, task.kv_head), a.v.token, n, a.headdim, to, width);
    }
  }

  void load_queries() {
    const auto row = [&](int64_t r) { return at<T>(a.q, rows->batch, rows->token[r], rows->head[r]); };
    if constexpr (kPairs) {
      for (int64_t r = 0; r < rows->count; ++r) pack_row(row(r), a.headdim, straight_queries + r * elements);
      transpose(straight_queries, elements, rows->count, depth_of<E>(a.headdim), queries, kQueryTile);
    } else {
      pack_transposed(rows->count, a.headdim, static_cast<A>(a.scale * kLog2E), queries, row);
    }
  }

  // What multiplies scores.  Numbers have it in the queries; pairs would round it there.  Not 0, because 0 times the
  // infinity of a masked score is not.
  A unit() const {
    const A factor = kPairs ? static_cast<A>(a.scale * kLog2E) : A(1);
    return factor == A(0) ? static_cast<A>(1e-30) : factor;
  }

  void step(int64_t n, const E* k, const E* v, A* o, A* m, A* l) {
    const auto live_scores = [&](int64_t key, int64_t some) {
      return mask->scores_part(key, some, a.headdim).template in_elements<E>();
    };
    const auto live_keys = [&](int64_t row, int64_t some) {
      return mask->keys_part(row, some).template in_elements<E>();
    };
    const auto fetch = [this] { upcoming.fetch_some(); };
    multiply_parts<E, true>(scores_of(n, a.headdim, k, elements, queries, scores), live_scores, fetch);
    E* p = reinterpret_cast<E*>(scores);
    for (int64_t i = 0; i < Mask<A>::kVectors; ++i) {
      soften(i, p, m + i * V::size, l + i * V::size);
      mask->clear_rest(i, p);
    }
    Product<E> sums{rows->count, a.headdim, depth_of<E>(n), p, 1, kQueryTile, v, width, o, width};
    sums.start = o, sums.scale = decay, sums.scale_row = 1;
    multiply_parts<E, false>(sums, live_keys, fetch);
  }

  // Scores of one vector of queries to p; m and l move on.
  void soften(int64_t vector, E* p, A* m, A* l) {
    const int64_t lo = mask->vector_lo[vector], hi = mask->vector_hi[vector];
    const A* column = scores + vector * V::size;
    const A factor = unit(), infinity = static_cast<A>(__builtin_inf());
    const V none(-infinity), by(factor);
    mask->hide(*rows, vector, scores, factor < A(0) ? infinity : -infinity);
    if (lo >= hi) return V(A(1)).store(decay + vector * V::size);
    const V before = V::load(m);
    V tops[4] = {before, before, before, before};
    for_fours(lo, hi, [&](int64_t j, int lane) {
      const V score = V::load(column + j * kQueryTile);
      tops[lane] = max(tops[lane], kPairs ? score * by : score);
    });
    const V after = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    after.store(m);
    const V base = select<A>(after > none, after, V());  // nothing seen yet: 2^(-inf - 0) = 0
    const V decayed = power_of_two(before - base);
    decayed.store(decay + vector * V::size);
    V sums[2];
    const auto share = [&](int64_t j) {
      const V score = V::load(column + j * kQueryTile);
      const V found = power_of_two(kPairs ? fma(score, by, -base) : score - base);
      sums[j % 2] += found;
      return found;
    };
    const auto put_two = [&](int64_t j, V even, V odd) { put(p, kQueryTile, j, vector * V::size, even, odd); };
    int64_t j = lo;
    if (j % 2 == 1) put_two(j - 1, V(), share(j)), ++j;
    for (; j + 1 < hi; j += 2) {
      const V even = share(j);
      put_two(j, even, share(j + 1));
    }
    if (j < hi) put_two(j, share(j), V());
    fma(decayed, V::load(l), sums[0] + sums[1]).store(l);
  }

  void finish(const AttentionTask& task, int64_t r) {
    const int64_t row = task.begin + r, i = row % a.qlen, head = task.kv_head * (a.heads / a.kv_heads) + row / a.qlen;
    const A sum = total[r], lse = sum == A(0) ? -static_cast<A>(__builtin_inf()) : top[r] + log2_of(sum);
    const V share(sum == A(0) ? A(0) : A(1) / sum);
    const int64_t by_head = (task.batch * a.heads + head) * a.qlen + i;
    if (a.splits > 1) {
      const int64_t part = task.split * a.batch * a.heads * a.qlen + by_head;
      static_cast<A*>(a.part_lse)[part] = lse;
      return write(r, share, static_cast<A*>(a.parts) + part * a.headdim);
    }
    static_cast<A*>(a.lse)[by_head] = lse * static_cast<A>(kLn2);
    write(r, share, static_cast<T*>(a.out) + ((task.batch * a.qlen + i) * a.heads + head) * a.headdim);
  }

  template <class To>
  void write(int64_t r, V share, To* to) const {
    for_lanes<V>(a.headdim, [&](int64_t d, auto lanes) { (V::load(out + r * width + d) * share).store(to + d, lanes); });
  }
};

template <class T>
void forward(const AttentionForward& a) {
  for_tasks<Forward<T>>(a);
}

}  // namespace

void mma_attention_fwd(const AttentionForward& arguments) {
  with_storage(arguments.storage, [&](auto element) { forward<decltype(element)>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
