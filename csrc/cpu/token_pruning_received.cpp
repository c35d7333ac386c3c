// s_j = 1 / (heads |R|) sum over rows r in R and heads h of softmax_j(scale q_rh . k_jh): the mean of the map's columns.
// The score of HiPrune, and of VisionZip and VisPruner without [CLS]; formulas in the op's README.
//
// A task owns a head of a sample.  It turns the keys once, [headdim][key], and passes blocks of rows by: the products of a
// block, its softmax rows, and their sum into the task's own columns, all of them in cache.  Heads are added in order
// afterwards: neither the batch nor the number of threads changes a bit.
#include "cpu/token_pruning.h"

#include "common/arena.h"
#include "common/parallel.h"
#include "common/vec_math.h"
#include "cpu/ssd_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int64_t kRows = 24;  // of a block: whole register tiles; 24 x 577 scores and a head's keys fit a second-level cache

template <class T> MMK_INLINE const T* head_of(const HeadsIn& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch_stride + row * x.row_stride + head * x.head_stride;
}

// to[c][j] = key j [c], zeros up to the next whole vector of keys.
template <class T, class A>
void turn_keys(const T* keys, int64_t stride, int64_t n, int64_t headdim, A* to, int64_t width) {
  using V = Vec<A>;
  for (int64_t j = 0; j < n; j += V::size) {
    const int64_t height = n - j < V::size ? n - j : V::size;
    for_lanes<V>(headdim, [&](int64_t c, auto lanes) {
      V square[V::size];
      for (int64_t i = 0; i < height; ++i) square[i] = V::load(keys + (j + i) * stride + c, lanes);
      transpose_square(square);
      const int64_t columns = headdim - c < V::size ? headdim - c : V::size;
      for (int64_t i = 0; i < columns; ++i) square[i].store(to + (c + i) * width + j);
    });
  }
}

template <class T, class A>
struct Head {
  using V = Vec<A>;
  const AttentionColumns& a;
  int64_t width;  // keys, rounded up to whole vectors
  int64_t first_seen = 0;  // the first key that is not masked
  A *keys, *queries, *scores;
  A* hidden;  // -inf where a key is masked, else 0

  Head(Arena& arena, const AttentionColumns& call) : a(call), width(padded<A>(call.keys)) {
    keys = arena.take<A>(a.headdim * width);
    queries = arena.take<A>(kRows * a.headdim);
    scores = arena.take<A>(kRows * width);
    hidden = arena.take<A>(width);
  }

  void run(int64_t b, int64_t h) {
    const int64_t group = a.heads / a.kv_heads;
    turn_keys(head_of<T>(a.k, b, 0, h / group), a.k.row_stride, a.keys, a.headdim, keys, width);
    first_seen = a.keys;
    for (int64_t j = a.keys - 1; j >= 0; --j) {
      const bool sees = a.key_mask == nullptr || a.key_mask[b * a.keys + j];
      if (sees) first_seen = j;
      hidden[j] = sees ? A(0) : -static_cast<A>(__builtin_inf());
      // NaN behind the mask must not come through a product.
      for (int64_t c = 0; c < a.headdim && !sees; ++c) keys[c * width + j] = A(0);
    }
    A* to = static_cast<A*>(a.sums) + (b * a.heads + h) * a.keys;
    for (int64_t j = 0; j < a.keys; ++j) to[j] = A(0);
    int64_t rows[kRows], n = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
      if (a.query_mask == nullptr || a.query_mask[b * a.rows + r]) rows[n++] = r;
      if (n == kRows || (r + 1 == a.rows && n > 0)) block(b, h, rows, n, to), n = 0;
    }
  }

  // Keys that row r may see, before the mask.
  int64_t reach(int64_t r) const {
    const int64_t causal = r + a.keys - a.rows + 1;
    return !a.causal || causal > a.keys ? a.keys : causal < 0 ? 0 : causal;
  }

  void block(int64_t b, int64_t h, const int64_t* rows, int64_t n, A* to) {
    const V scale(A(a.scale));
    for (int64_t i = 0; i < n; ++i) {
      const T* from = head_of<T>(a.q, b, rows[i], h);
      A* query = queries + i * a.headdim;
      for_lanes<V>(a.headdim, [&](int64_t c, auto lanes) { (V::load(from + c, lanes) * scale).store(query + c, lanes); });
    }
    const int64_t most = reach(rows[n - 1]);  // rows rise
    if (most == 0) return;
    multiply(Product<A>{n, most, a.headdim, queries, a.headdim, 1, keys, width, scores, width});
    for (int64_t i = 0; i < n; ++i) {
      const A* lse = a.lse == nullptr ? nullptr : static_cast<const A*>(a.lse) + (b * a.heads + h) * a.rows + rows[i];
      add_row(scores + i * width, reach(rows[i]), lse, to);
    }
  }

  // Adds a softmax row over the first n keys.
  void add_row(A* x, int64_t n, const A* lse, A* to) {
    if (first_seen >= n) return;
    const A none = -static_cast<A>(__builtin_inf());
    V most(none);
    if (a.key_mask != nullptr) {
      for_lanes<V>(n, [&](int64_t j, auto lanes) {
        (V::load(x + j, lanes) + V::load(hidden + j, lanes)).store(x + j, lanes);
      });
    }
    const int64_t whole = n / V::size * V::size;
    for (int64_t j = 0; j < whole; j += V::size) most = max(most, V::load(x + j));
    A peak = max_lane(most);
    for (int64_t j = whole; j < n; ++j) peak = x[j] > peak ? x[j] : peak;
    const V shift(lse != nullptr ? *lse : peak);
    V total;
    for_lanes<V>(n, [&](int64_t j, auto lanes) {
      exp(V::load(x + j, lanes) - shift).store(x + j, lanes);
      total += V::load(x + j, lanes);  // again: the lanes behind the last key are no zeros after the exponential
    });
    const V factor(lse != nullptr ? A(1) : A(1) / sum(total));
    for_lanes<V>(n, [&](int64_t j, auto lanes) {
      fma(V::load(x + j, lanes), factor, V::load(to + j, lanes)).store(to + j, lanes);
    });
  }
};

template <class A>
void add_heads(const AttentionColumns& a) {
  using V = Vec<A>;
  const int64_t kept = a.keys - a.num_prefix;
  parallel_for(a.batch, grain_of(a.heads * a.keys), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t chosen = a.query_mask == nullptr ? a.rows : 0;
      for (int64_t r = 0; r < a.rows && a.query_mask != nullptr; ++r) chosen += a.query_mask[b * a.rows + r] ? 1 : 0;
      const V mean(A(1.0 / static_cast<double>(a.heads * (chosen > 0 ? chosen : 1))));
      const A* sums = static_cast<const A*>(a.sums) + b * a.heads * a.keys + a.num_prefix;
      A* to = static_cast<A*>(a.scores) + b * kept;
      for_lanes<V>(kept, [&](int64_t j, auto lanes) {
        V total;
        for (int64_t h = 0; h < a.heads; ++h) total += V::load(sums + h * a.keys + j, lanes);
        (total * mean).store(to + j, lanes);
      });
    }
  });
}

}  // namespace

void attention_column_scores(const AttentionColumns& a) {
  if (a.batch == 0 || a.keys == a.num_prefix) return;
  with_storage(a.storage, [&](auto element) {
    using T = decltype(element);
    using A = Arithmetic<T>;
    parallel_for(a.batch * a.heads, grain_of(a.rows * a.keys * a.headdim / 8), [&](int64_t begin, int64_t end) {
      Arena measure{nullptr};
      Head<T, A>(measure, a);
      Arena arena{static_cast<char*>(thread_scratch(measure.used))};
      Head<T, A> work(arena, a);
      for (int64_t task = begin; task < end; ++task) work.run(task / a.heads, task % a.heads);
    });
    add_heads<A>(a);
  });
}

}  // namespace mmkernels::MMK_ISA_NS
