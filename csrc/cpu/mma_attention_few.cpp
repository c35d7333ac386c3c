// Attention of few query rows over many keys, as in decoding: keys and values are read once, for all heads that share
// them.  Lanes run over headdim, so that nothing needs packing.  Here also the joining of results over stretches.
#include "cpu/mma_attention_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// Reads 2 * Vec<A>::size consecutive elements as two vectors, in an order of its own: of bf16 the even ones and the odd
// ones, which takes no shuffle.
template <class A, class T>
struct Pair {
  static constexpr bool split = false;
  Vec<A> first, second;
  MMK_INLINE explicit Pair(const T* from) : first(Vec<A>::load(from)), second(Vec<A>::load(from + Vec<A>::size)) {}
};
template <>
struct Pair<float, bf16> {
  static constexpr bool split = true;
  Vec<float> first, second;
  MMK_INLINE explicit Pair(const bf16* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    first = bit_cast<Vec<float>::Raw>(words << 16), second = bit_cast<Vec<float>::Raw>(words & 0xffff0000u);
  }
};

template <class T>
struct Few {
  using A = Arithmetic<T>;
  using V = Vec<A>;
  static constexpr int64_t kPair = 2 * V::size, kAhead = 16;

  const AttentionForward& a;
  int64_t width, pairs;  // elements of a padded row; those of them that are read in pairs, as vectors
  int64_t held;          // rows of state: those of all heads of a task
  int64_t together, now;  // the task's heads, and the one at work
  A *queries, *out, *top, *total, *scores;  // total: a vector a row; scores: [row][key]
  Rows96* rows;
  Mask<A>* mask;

  Few(Arena& arena, const AttentionForward& call) : a(call), width(padded<A>(a.headdim)), pairs(a.headdim / kPair * 2) {
    int64_t heads = 1;
    for (int64_t i = 0; i < a.share[a.shares]; ++i) heads = most(heads, a.task[i].kv_heads);
    held = heads * a.most_rows;
    queries = arena.take<A>(held * width), out = arena.take<A>(held * width);
    top = arena.take<A>(held), total = arena.take<A>(held * V::size);
    scores = arena.take<A>(a.most_rows * kKeyTile);
    rows = arena.take<Rows96>(1), mask = arena.take<Mask<A>>(1);
  }

  void run(const AttentionTask& task) {
    const int64_t all = task.kv_heads * task.rows;
    together = task.kv_heads;
    for (int64_t r = 0; r < all; ++r) {
      top[r] = -static_cast<A>(__builtin_inf());
      V().store(total + r * V::size);
      load_query(task, r);
      for (int64_t i = 0; i < width; i += V::size) V().store(out + r * width + i);
    }
    // Which keys a row sees does not depend on its head of keys.
    rows->take(a, task.batch, task.kv_head, task.begin, task.rows);
    for (int64_t key = task.first_key; key < task.last_key; key += kKeyTile) {
      const int64_t n = least(kKeyTile, task.last_key - key);
      if (!mask->any(a, *rows, key, n)) continue;
      if (!mask->full) mask->enclose(*rows);
      const Part live = mask->keys_part(0, task.rows);
      for (int64_t h = 0; h < task.kv_heads; ++h) {
        now = h;
        const T* k = at<T>(a.k, task.batch, key, task.kv_head + h);
        const T* v = at<T>(a.v, task.batch, key, task.kv_head + h);
        by_rows(task.rows, [&](int64_t r, auto some) { score<decltype(some)::value>(h * task.rows + r, r, k, live); });
        for (int64_t r = 0; r < task.rows; ++r) soften(h * task.rows + r, r, live);
        by_rows(task.rows, [&](int64_t r, auto some) { sum<decltype(some)::value>(h * task.rows + r, r, v, live); });
      }
    }
    for (int64_t r = 0; r < all; ++r) finish(task, r);
  }

  // Blocks of 4, 2 and 1 rows: work(row, Constant<rows>).
  template <class Work>
  MMK_INLINE void by_rows(int64_t count, const Work& work) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) work(r, Constant<4>{});
    if (r + 2 <= count) work(r, Constant<2>{}), r += 2;
    if (r < count) work(r, Constant<1>{});
  }

  // Where to ask for memory while key j of a tile is read, the tile being that of the task's head h: of one head kAhead
  // keys later; of several that lie side by side one tile later, all of it in the order of memory.
  MMK_INLINE uintptr_t soon(const AttentionIn& in, const T* key, int64_t j) const {
    int64_t distance = (j + kAhead) * in.token;
    if (together > 1) {
      const int64_t number = now * kKeyTile + j;
      distance = (kKeyTile + number / together) * in.token + (number % together - now) * in.head;
    }
    return reinterpret_cast<uintptr_t>(key) + static_cast<uintptr_t>(distance) * sizeof(T);
  }

  // Into the second-level cache.  One request beside each read: many at once would wait for each other.
  static MMK_INLINE void fetch(uintptr_t place) {
    for (size_t i = 0; i < kPair * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(place + i), 0, 2);
  }

  void load_query(const AttentionTask& task, int64_t r) {
    const int64_t row = task.begin + r % task.rows;
    const int64_t head = (task.kv_head + r / task.rows) * (a.heads / a.kv_heads) + row / a.qlen;
    const T* from = at<T>(a.q, task.batch, row % a.qlen, head);
    const V factor(static_cast<A>(a.scale * kLog2E));
    A* to = queries + r * width;
    for (int64_t i = 0; i < pairs; i += 2) {
      const Pair<A, T> two(from + i * V::size);
      (two.first * factor).store(to + i * V::size), (two.second * factor).store(to + (i + 1) * V::size);
    }
    const int64_t rest = pairs * V::size;
    for_lanes<V>(a.headdim - rest, [&](int64_t i, auto lanes) {
      (V::load(from + rest + i, lanes) * factor).store(to + rest + i);
    });
  }

  // Scores of R rows and the live keys.  V::size dot products at a time, whose lanes are then added together.
  template <int R>
  __attribute__((noinline)) void score(int64_t state, int64_t r, const T* k, const Part& live) {
    constexpr int some = V::size / R > 0 ? V::size / R : 1, dots = some * R;
    const A* q = queries + state * width;
    for (int64_t key = live.from; key < live.to; key += some) {
      const T* from[some];
      // Behind the last live key the last one again: nobody reads the score.
      for (int j = 0; j < some; ++j) from[j] = k + least(key + j, live.to - 1) * a.k.token;
      V sums[dots > V::size ? dots : V::size];
      // A few keys at a time, so that memory is read nearly in order.
      constexpr int step = some < 4 ? some : 4;
      for (int j0 = 0; j0 < some; j0 += step) {
        V dot[step][R];
        uintptr_t ahead[step];
        for (int j = 0; j < step; ++j) ahead[j] = soon(a.k, k, key + j0 + j);
        for (int64_t i = 0; i < pairs; i += 2) {
#pragma GCC unroll 4
          for (int j = 0; j < step; ++j) {
            fetch(ahead[j] + i * V::size * sizeof(T));
            const Pair<A, T> two(from[j0 + j] + i * V::size);
#pragma GCC unroll 4
            for (int x = 0; x < R; ++x) {
              dot[j][x] = fma(two.first, V::load(q + x * width + i * V::size), dot[j][x]);
              dot[j][x] = fma(two.second, V::load(q + x * width + (i + 1) * V::size), dot[j][x]);
            }
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < step; ++j) {
#pragma GCC unroll 4
          for (int x = 0; x < R; ++x) sums[x * some + j0 + j] = dot[j][x];
        }
      }
      for (int64_t i = pairs * V::size; i < a.headdim; i += V::size) {
        const int lanes = static_cast<int>(least(V::size, a.headdim - i));
        for (int j = 0; j < some; ++j) {
          const V right = V::load(from[j] + i, lanes);
          for (int x = 0; x < R; ++x) sums[x * some + j] = fma(right, V::load(q + x * width + i), sums[x * some + j]);
        }
      }
      A found[dots > V::size ? dots : V::size];
      for (int d = 0; d < dots; d += V::size) sum_each(sums + d).store(found + d);
      for (int x = 0; x < R; ++x) {
        for (int j = 0; j < some && key + j < kKeyTile; ++j) scores[(r + x) * kKeyTile + key + j] = found[x * some + j];
      }
    }
  }

  bool sees(int64_t r, int64_t j) const {
    const int64_t key = mask->first_key + j;
    if (rows->start[r] <= key && key < rows->end[r]) return true;
    for (int64_t i = 0; i < mask->hit_count; ++i) {
      const AttentionRect& rect = mask->hits[i];
      if (rect.q0 <= rows->token[r] && rows->token[r] < rect.q1 && rect.k0 <= key && key < rect.k1) return true;
    }
    return false;
  }

  // Scores of a row to p, in place; its top, total and out move on.
  void soften(int64_t state, int64_t r, const Part& live) {
    A* s = scores + r * kKeyTile;
    const A none = -static_cast<A>(__builtin_inf());
    for (int64_t j = 0; j < live.from; ++j) s[j] = none;
    for (int64_t j = live.to; j < kKeyTile; ++j) s[j] = none;
    for (int64_t j = live.from; j < live.to && !mask->full; ++j) {
      if (!sees(r, j)) s[j] = none;
    }
    V tops(top[state]);
    for (int64_t j = 0; j < kKeyTile; j += V::size) tops = max(tops, V::load(s + j));
    const A before = top[state], after = max_lane(tops);
    top[state] = after;
    const V base(after > none ? after : A(0));
    V sums;
    for (int64_t j = 0; j < kKeyTile; j += V::size) {
      const V p = power_of_two(V::load(s + j) - base);
      p.store(s + j);
      sums += p;
    }
    const V decay = power_of_two(V(before) - base);
    fma(decay, V::load(total + state * V::size), sums).store(total + state * V::size);
    if (!(after > before)) return;
    A* o = out + state * width;
    for (int64_t i = 0; i < width; i += V::size) (V::load(o + i) * decay).store(o + i);
  }

  // out += p v for R rows: as many vectors of headdim at a time as registers hold.
  template <int R>
  MMK_INLINE void sum(int64_t state, int64_t r, const T* v, const Part& live) {
    A* o = out + state * width;
    const A* p = scores + r * kKeyTile;
    constexpr int wide = R == 4 ? 4 : 8;
    int64_t i = 0;
    for (; i + wide <= pairs; i += wide) sum_pairs<R, wide>(o + i * V::size, p, v + i * V::size, live);
    for (; i < pairs; i += 2) sum_pairs<R, 2>(o + i * V::size, p, v + i * V::size, live);
    for (int64_t d = i * V::size; d < a.headdim; d += V::size) {
      const int lanes = static_cast<int>(least(V::size, a.headdim - d));
      V sums[R];
      for (int x = 0; x < R; ++x) sums[x] = V::load(o + x * width + d);
      for (int64_t j = live.from; j < live.to; ++j) {
        const V right = V::load(v + j * a.v.token + d, lanes);
        for (int x = 0; x < R; ++x) sums[x] = fma(V(p[x * kKeyTile + j]), right, sums[x]);
      }
      for (int x = 0; x < R; ++x) sums[x].store(o + x * width + d);
    }
  }

  // Not inline: it needs every register.
  template <int R, int N>
  __attribute__((noinline)) void sum_pairs(A* o, const A* p, const T* v, const Part& live) {
    V sums[R][N];
#pragma GCC unroll 4
    for (int x = 0; x < R; ++x) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[x][n] = V::load(o + x * width + n * V::size);
    }
    for (int64_t j = live.from; j < live.to; ++j) {
      const T* from = v + j * a.v.token;
      const uintptr_t ahead = soon(a.v, v, j);
      V share[R];
#pragma GCC unroll 4
      for (int x = 0; x < R; ++x) share[x] = V(p[x * kKeyTile + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n += 2) {
        fetch(ahead + n * V::size * sizeof(T));
        const Pair<A, T> two(from + n * V::size);
#pragma GCC unroll 4
        for (int x = 0; x < R; ++x) {
          sums[x][n] = fma(share[x], two.first, sums[x][n]), sums[x][n + 1] = fma(share[x], two.second, sums[x][n + 1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int x = 0; x < R; ++x) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[x][n].store(o + x * width + n * V::size);
    }
  }

  void finish(const AttentionTask& task, int64_t r) {
    const int64_t row = task.begin + r % task.rows, i = row % a.qlen;
    const int64_t head = (task.kv_head + r / task.rows) * (a.heads / a.kv_heads) + row / a.qlen;
    const A whole = mmkernels::MMK_ISA_NS::sum(V::load(total + r * V::size));
    const A lse = whole == A(0) ? -static_cast<A>(__builtin_inf()) : top[r] + log2_of(whole);
    const V share(whole == A(0) ? A(0) : A(1) / whole);
    const int64_t by_head = (task.batch * a.heads + head) * a.qlen + i;
    if (a.splits > 1) {
      const int64_t part = task.split * a.batch * a.heads * a.qlen + by_head;
      static_cast<A*>(a.part_lse)[part] = lse;
      return write(out + r * width, share, static_cast<A*>(a.parts) + part * a.headdim);
    }
    static_cast<A*>(a.lse)[by_head] = lse * static_cast<A>(kLn2);
    write(out + r * width, share, static_cast<T*>(a.out) + ((task.batch * a.qlen + i) * a.heads + head) * a.headdim);
  }

  template <class To>
  void write(const A* from, V share, To* to) const {
    for (int64_t i = 0; i < pairs; i += 2) {
      const V first = V::load(from + i * V::size) * share, second = V::load(from + (i + 1) * V::size) * share;
      (Pair<A, T>::split ? interleave<true>(first, second) : first).store(to + i * V::size);
      (Pair<A, T>::split ? interleave<false>(first, second) : second).store(to + (i + 1) * V::size);
    }
    const int64_t rest = pairs * V::size;
    for_lanes<V>(a.headdim - rest, [&](int64_t d, auto lanes) {
      (V::load(from + rest + d) * share).store(to + rest + d, lanes);
    });
  }
};

// out = sum of the parts by their shares 2^(lse_s - lse), in the order of the keys.
template <class T>
void join_row(const AttentionForward& a, int64_t row) {
  using A = Arithmetic<T>;
  using V = Vec<A>;
  const int64_t rows = a.batch * a.heads * a.qlen;
  const A* lse = static_cast<const A*>(a.part_lse) + row;
  const A* parts = static_cast<const A*>(a.parts) + row * a.headdim;
  const A none = -static_cast<A>(__builtin_inf());
  A top = none, whole = 0;
  for (int64_t s = 0; s < a.splits; ++s) {
    const A one = lse[s * rows];
    top = one > top || one != one ? one : top;  // keeps a NaN
  }
  const auto weight = [&](int64_t s) {
    A lanes[V::size];
    power_of_two(V(lse[s * rows] - (top == none ? A(0) : top))).store(lanes);
    return lanes[0];
  };
  for (int64_t s = 0; s < a.splits; ++s) whole += weight(s);
  static_cast<A*>(a.lse)[row] = whole == A(0) ? none : (top + log2_of(whole)) * static_cast<A>(kLn2);
  const int64_t i = row % a.qlen, head = row / a.qlen % a.heads, batch = row / a.qlen / a.heads;
  T* to = static_cast<T*>(a.out) + ((batch * a.qlen + i) * a.heads + head) * a.headdim;
  const A inverse = whole == A(0) ? A(0) : A(1) / whole;
  for_lanes<V>(a.headdim, [&](int64_t d, auto lanes) {
    V sum;
    for (int64_t s = 0; s < a.splits; ++s) {
      if (lse[s * rows] == none) continue;
      sum = fma(V(weight(s) * inverse), V::load(parts + s * rows * a.headdim + d, lanes), sum);
    }
    sum.store(to + d, lanes);
  });
}

}  // namespace

void mma_attention_few(const AttentionForward& arguments) {
  with_storage(arguments.storage, [&](auto element) { for_tasks<Few<decltype(element)>>(arguments); });
}

void mma_attention_join(const AttentionForward& a) {
  with_storage(a.storage, [&](auto element) {
    parallel_for(a.batch * a.heads * a.qlen, grain_of(a.splits * a.headdim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) join_row<decltype(element)>(a, row);
    });
  });
}

}  // namespace mmkernels::MMK_ISA_NS
