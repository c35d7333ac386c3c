// Forward of attention over live tiles, by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A task owns some query rows of the heads that share keys, and walks the keys in blocks.  A block's tiles are packed
// when first needed, as [key][headdim], and serve all of the task's queries.  Per tile, with s = q k^T scale log2(e):
//   m' = max(m, max s),  p = 2^(s - m'),  l' = 2^(m - m') l + sum p,  o' = 2^(m - m') o + p v
#include "cpu/mma_attention_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

template <class T>
struct Forward {
  using A = Arithmetic<T>;
  using V = Vec<A>;

  const AttentionForward& a;
  int64_t width;  // elements of a padded row of headdim
  A *keys, *values, *queries, *scores, *out, *top, *total, *decay;
  Rows96* rows;
  Mask<A>* mask;
  bool packed[kKeyBlock / kKeyTile];

  Forward(Arena& arena, const AttentionForward& call) : a(call), width(padded<A>(a.headdim)) {
    const int64_t block = least(kKeyBlock, (a.klen + kKeyTile - 1) / kKeyTile * kKeyTile);
    const int64_t held = (a.most_rows + kQueryTile - 1) / kQueryTile * kQueryTile;
    keys = arena.take<A>(block * width), values = arena.take<A>(block * width);
    queries = arena.take<A>(a.headdim * kQueryTile), scores = arena.take<A>(kKeyTile * kQueryTile);
    out = arena.take<A>(held * width), top = arena.take<A>(held), total = arena.take<A>(held);
    decay = arena.take<A>(kQueryTile);
    rows = arena.take<Rows96>(1), mask = arena.take<Mask<A>>(1);
  }

  void run(const AttentionTask& task) {
    for (int64_t r = 0; r < (task.rows + kQueryTile - 1) / kQueryTile * kQueryTile; ++r) {
      top[r] = -static_cast<A>(__builtin_inf()), total[r] = 0;
    }
    for (int64_t i = 0; i < task.rows * width; i += V::size) V().store(out + i);
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
      const int64_t n = least(kKeyTile, end - key), offset = (key - block) * width;
      if (!mask->open(a, *rows, key, n)) continue;
      if (!loaded) load_queries(), loaded = true;
      bool& done = packed[(key - block) / kKeyTile];
      if (!done) {
        pack_rows(at<T>(a.k, task.batch, key, task.kv_head), a.k.token, n, a.headdim, keys + offset, width);
        pack_rows(at<T>(a.v, task.batch, key, task.kv_head), a.v.token, n, a.headdim, values + offset, width);
        done = true;
      }
      step(n, keys + offset, values + offset, out + r * width, top + r, total + r);
    }
  }

  void load_queries() {
    pack_transposed(rows->count, a.headdim, static_cast<A>(a.scale * kLog2E), queries, [&](int64_t r) {
      return at<T>(a.q, rows->batch, rows->token[r], rows->head[r]);
    });
  }

  void step(int64_t n, const A* k, const A* v, A* o, A* m, A* l) {
    multiply_parts<A, true>(scores_of(n, a.headdim, k, width, queries, scores),
                            [&](int64_t key, int64_t some) { return mask->scores_part(key, some, a.headdim); });
    for (int64_t i = 0; i < Mask<A>::kVectors; ++i) {
      soften(i, m + i * V::size, l + i * V::size);
    }
    Product<A> sums{rows->count, a.headdim, n, scores, 1, kQueryTile, v, width, o, width};
    sums.start = o, sums.scale = decay, sums.scale_row = 1;
    multiply_parts<A, false>(sums, [&](int64_t row, int64_t some) { return mask->keys_part(row, some); });
  }

  // Scores of one vector of queries to p, in place; m and l move on.
  void soften(int64_t vector, A* m, A* l) {
    const int64_t lo = mask->vector_lo[vector], hi = mask->vector_hi[vector];
    A* column = scores + vector * V::size;
    const V none(-static_cast<A>(__builtin_inf()));
    mask->apply(*rows, vector, scores);
    if (lo >= hi) return V(A(1)).store(decay + vector * V::size);
    const V before = V::load(m);
    V tops[4] = {before, before, before, before};
    for_fours(lo, hi, [&](int64_t j, int lane) { tops[lane] = max(tops[lane], V::load(column + j * kQueryTile)); });
    const V after = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    after.store(m);
    const V base = select<A>(after > none, after, V());  // nothing seen yet: 2^(-inf - 0) = 0
    const V decayed = power_of_two(before - base);
    decayed.store(decay + vector * V::size);
    V sums[4];
    for_fours(lo, hi, [&](int64_t j, int lane) {
      A* at = column + j * kQueryTile;
      const V p = power_of_two(V::load(at) - base);
      p.store(at);
      sums[lane] += p;
    });
    fma(decayed, V::load(l), (sums[0] + sums[1]) + (sums[2] + sums[3])).store(l);
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
