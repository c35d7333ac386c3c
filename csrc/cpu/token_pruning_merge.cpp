// y_o = x_b + sum of s_a / S_o (x_a - x_b) over what is merged into slot o, S_o = s_b + sum of s_a, b the token that
// remains there.  ToMe, arXiv 2210.09461, section 3; gradients derived in the op's README.
//
// A first walk over what is merged chains it up by slots, in the order of the plan.  Then each slot is a row that is
// written once: a copy where nothing is merged, else a sum over its few rows, vector by vector.  A token's gradient
// reads that of its slot, so that nothing is added up across tasks.
#include "cpu/token_pruning.h"

#include "common/parallel.h"
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// What a plan says of one sample.
struct Plan {
  const int64_t *keep, *assignment, *source;
  Plan(const MergePlan& plan, int64_t b)
      : keep(plan.keep_indices + b * plan.width), assignment(plan.assignment + b * plan.tokens),
        source(plan.source + b * plan.merged) {}
};

template <class A> MMK_INLINE A size_of(const void* sizes, int64_t token) {
  return sizes == nullptr ? A(1) : static_cast<const A*>(sizes)[token];
}

void chain(const MergeTokens& a, int64_t b) {
  const Plan plan(a.plan, b);
  int64_t *first = a.first + b * a.plan.width, *next = a.next + b * a.plan.merged;
  for (int64_t slot = 0; slot < a.plan.width; ++slot) first[slot] = -1;
  for (int64_t i = a.plan.merged - 1; i >= 0; --i) {  // the last one first, so that chains are in the order of the plan
    const int64_t slot = plan.assignment[plan.source[i]];
    next[i] = first[slot];
    first[slot] = i;
  }
}

template <class T, class A>
void merge_slot(const MergeTokens& a, int64_t b, int64_t slot) {
  using V = Vec<A>;
  const Plan plan(a.plan, b);
  const int64_t base = b * a.plan.tokens, head = a.first[b * a.plan.width + slot];
  const int64_t* next = a.next + b * a.plan.merged;
  const auto row = [&](int64_t token) {
    return static_cast<const T*>(a.x) + b * a.batch_stride + token * a.row_stride;
  };
  A total = size_of<A>(a.sizes, base + plan.keep[slot]);
  for (int64_t i = head; i >= 0; i = next[i]) total += size_of<A>(a.sizes, base + plan.source[i]);
  static_cast<A*>(a.totals)[b * a.plan.width + slot] = total;
  const T* stays = row(plan.keep[slot]);
  T* to = static_cast<T*>(a.out) + (b * a.plan.width + slot) * a.dim;
  if (head < 0) {
    if (a.dim > 0) __builtin_memcpy(to, stays, static_cast<size_t>(a.dim) * sizeof(T));
    return;
  }
  for_lanes<V>(a.dim, [&](int64_t c, auto lanes) {
    const V value = V::load(stays + c, lanes);
    V change;
    for (int64_t i = head; i >= 0; i = next[i]) {
      const V share(size_of<A>(a.sizes, base + plan.source[i]) / total);
      change = fma(share, V::load(row(plan.source[i]) + c, lanes) - value, change);
    }
    (value + change).store(to + c, lanes);
  });
}

// With P_a = g_o . (x_a - x_b) and p_o = sum of s_a / S_o P_a:  dL/ds_i = dL/dS_o + (P_i - p_o) / S_o, where P_b = 0.
template <class T, class A>
void size_gradients(const MergeTokensGradient& a, int64_t b) {
  using V = Vec<A>;
  const Plan plan(a.plan, b);
  const int64_t at = b * a.plan.width;
  const A *sizes = static_cast<const A*>(a.sizes) + b * a.plan.tokens, *totals = static_cast<const A*>(a.totals) + at;
  const A* grad_totals = static_cast<const A*>(a.grad_totals) + at;
  A *pull = static_cast<A*>(a.pull) + at, *products = static_cast<A*>(a.products) + b * a.plan.merged;
  A* to = static_cast<A*>(a.grad_sizes) + b * a.plan.tokens;
  for (int64_t slot = 0; slot < a.plan.width; ++slot) pull[slot] = A(0);
  for (int64_t i = 0; i < a.plan.merged; ++i) {
    const int64_t slot = plan.assignment[plan.source[i]];
    const T* x = static_cast<const T*>(a.x) + b * a.batch_stride;
    const T *merged = x + plan.source[i] * a.row_stride, *stays = x + plan.keep[slot] * a.row_stride;
    const T* grad = static_cast<const T*>(a.grad_out) + (at + slot) * a.dim;
    V sums;
    for_lanes<V>(a.dim, [&](int64_t c, auto lanes) {
      sums = fma(V::load(grad + c, lanes), V::load(merged + c, lanes) - V::load(stays + c, lanes), sums);
    });
    products[i] = sum(sums);
    pull[slot] += sizes[plan.source[i]] / totals[slot] * products[i];
  }
  for (int64_t token = 0; token < a.plan.tokens; ++token) {
    const int64_t slot = plan.assignment[token];
    to[token] = grad_totals[slot] - pull[slot] / totals[slot];
  }
  for (int64_t i = 0; i < a.plan.merged; ++i) {
    const int64_t token = plan.source[i];
    to[token] += products[i] / totals[plan.assignment[token]];
  }
}

template <class T, class A>
void token_gradient(const MergeTokensGradient& a, int64_t b, int64_t token) {
  using V = Vec<A>;
  const int64_t slot = b * a.plan.width + a.plan.assignment[b * a.plan.tokens + token];
  const V share(size_of<A>(a.sizes, b * a.plan.tokens + token) / static_cast<const A*>(a.totals)[slot]);
  const T* grad = static_cast<const T*>(a.grad_out) + slot * a.dim;
  T* to = static_cast<T*>(a.grad_x) + (b * a.plan.tokens + token) * a.dim;
  for_lanes<V>(a.dim, [&](int64_t c, auto lanes) { (share * V::load(grad + c, lanes)).store(to + c, lanes); });
}

}  // namespace

void merge_tokens(const MergeTokens& a) {
  if (a.plan.batch == 0) return;
  with_storage(a.storage, [&](auto element) {
    using T = decltype(element);
    using A = Arithmetic<T>;
    parallel_for(a.plan.batch, grain_of(a.plan.tokens), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) chain(a, b);
    });
    parallel_for(a.plan.batch * a.plan.width, grain_of(a.dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge_slot<T, A>(a, i / a.plan.width, i % a.plan.width);
    });
  });
}

void merge_tokens_bwd(const MergeTokensGradient& a) {
  if (a.plan.batch == 0) return;
  with_storage(a.storage, [&](auto element) {
    using T = decltype(element);
    using A = Arithmetic<T>;
    if (a.sizes != nullptr) {
      parallel_for(a.plan.batch, grain_of(a.plan.tokens + a.plan.merged * a.dim), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) size_gradients<T, A>(a, b);
      });
    }
    parallel_for(a.plan.batch * a.plan.tokens, grain_of(a.dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) token_gradient<T, A>(a, i / a.plan.tokens, i % a.plan.tokens);
    });
  });
}

}  // namespace mmkernels::MMK_ISA_NS
