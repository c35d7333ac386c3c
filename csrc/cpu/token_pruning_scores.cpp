// s_j = weight / (rows heads) sum over rows r and heads h of softmax_j(scale q_rh . k_jh), j behind the prefix.
// VTC-CLS, arXiv 2412.05819: the row of [CLS] in an encoder layer; formulas in the op's README.
//
// Two passes.  The products walk the keys in the order of memory, all heads of a key together, because a layer's keys are
// read once and hardly fit a cache.  The softmax rows, of which there are few, are made and added up by one task a sample,
// heads in order: neither the batch nor the number of threads changes a bit.
#include "cpu/token_pruning.h"

#include "common/parallel.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int kKeys = 4;          // that share the loads of a query
constexpr int64_t kKeyBlock = 32;  // of a task

template <class T> MMK_INLINE const T* head_of(const HeadsIn& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch_stride + row * x.row_stride + head * x.head_stride;
}

// to[i] = scale <q, key i> for N keys, `stride` apart.
template <int N, class T, class A>
MMK_INLINE void products(const T* q, const T* keys, int64_t stride, int64_t n, A scale, A* to) {
  using V = Vec<A>;
  V sums[N];
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    const V query = V::load(q + i, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[j] = fma(query, V::load(keys + j * stride + i, lanes), sums[j]);
  });
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) to[j] = scale * sum(sums[j]);
}

template <class T, class A>
void fill_logits(const ClsAttentionScores& a) {
  const int64_t blocks = (a.keys + kKeyBlock - 1) / kKeyBlock, group = a.heads / a.kv_heads;
  const int64_t work = kKeyBlock * a.heads * a.rows * a.headdim;
  parallel_for(a.batch * blocks, grain_of(work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * kKeyBlock;
      const int64_t last = first + kKeyBlock < a.keys ? first + kKeyBlock : a.keys;
      for (int64_t j = first; j < last;) {
        const bool whole = j + kKeys <= last;
        for (int64_t h = 0; h < a.heads; ++h) {
          const T* key = head_of<T>(a.k, b, j, h / group);
          for (int64_t r = 0; r < a.rows; ++r) {
            A* to = static_cast<A*>(a.logits) + ((b * a.heads + h) * a.rows + r) * a.keys + j;
            const T* q = head_of<T>(a.q, b, r, h);
            if (whole) {
              products<kKeys>(q, key, a.k.row_stride, a.headdim, A(a.scale), to);
            } else {
              products<1>(q, key, a.k.row_stride, a.headdim, A(a.scale), to);
            }
          }
        }
        j += whole ? kKeys : 1;
      }
    }
  });
}

// The largest of n >= 1 values; a NaN may be missed, and then comes back out of every exponential below.
template <class A>
MMK_INLINE A largest(const A* x, int64_t n) {
  using V = Vec<A>;
  V most(x[0]);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) most = max(most, V::load(x + i));
  A found = max_lane(most);
  for (; i < n; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// Adds the share of one softmax row: factor * exp(x - shift), with factor = 1 / the sum of all of them where lse is null.
template <class A>
MMK_INLINE void add_row(A* x, int64_t n, int64_t prefix, const A* lse, A* to) {
  using V = Vec<A>;
  const V shift(lse != nullptr ? *lse : largest(x, n));
  V total;
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    const V p = exp(V::load(x + i, lanes) - shift);
    p.store(x + i, lanes);
    // The lanes behind the last key are zeros before the exponential, not after it.
    total += V::load(x + i, lanes);
  });
  const V factor(lse != nullptr ? A(1) : A(1) / sum(total));
  for_lanes<V>(n - prefix, [&](int64_t i, auto lanes) {
    fma(V::load(x + prefix + i, lanes), factor, V::load(to + i, lanes)).store(to + i, lanes);
  });
}

template <class A>
void add_rows(const ClsAttentionScores& a) {
  using V = Vec<A>;
  const int64_t kept = a.keys - a.num_prefix, rows = a.heads * a.rows;
  parallel_for(a.batch, grain_of(rows * a.keys), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      A* to = static_cast<A*>(a.scores) + b * kept;
      for (int64_t i = 0; i < kept; ++i) to[i] = A(0);
      for (int64_t row = b * rows; row < (b + 1) * rows; ++row) {
        const A* lse = a.lse == nullptr ? nullptr : static_cast<const A*>(a.lse) + row;
        add_row(static_cast<A*>(a.logits) + row * a.keys, a.keys, a.num_prefix, lse, to);
      }
      const V mean(A(a.weight / static_cast<double>(rows)));
      for_lanes<V>(kept, [&](int64_t i, auto lanes) { (V::load(to + i, lanes) * mean).store(to + i, lanes); });
    }
  });
}

}  // namespace

void cls_attention_scores(const ClsAttentionScores& a) {
  if (a.batch == 0 || a.keys == a.num_prefix) return;
  with_storage(a.storage, [&](auto element) {
    using T = decltype(element);
    fill_logits<T, Arithmetic<T>>(a);
    add_rows<Arithmetic<T>>(a);
  });
}

}  // namespace mmkernels::MMK_ISA_NS
