// What opens a Mamba-2 step: the residual sum with its RMS norm, and small parameters in the arithmetic type.
//
// Dao and Gu, "Transformers are SSMs" (2024), section 7.  A row is a token: a few thousand numbers that stay in L1.
#include "cpu/mamba2_step.h"

#include "common/vec.h"
#include "common/vec_math.h"
#include "cpu/conv_rows.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

template <class A>
void widen_any(Storage storage, const void* from, int64_t stride, int64_t n, A* to) {
  with_storage(storage, [&](auto element) {
    using T = decltype(element);
    widen_row(static_cast<const T*>(from), stride, n, to);
  });
}

template <class A>
MMK_INLINE const void* row_start(const RowsIn& rows, Storage storage, int64_t r) {
  const int64_t size = storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2;
  return static_cast<const char*>(rows.data) + r * rows.stride * size;
}

// The row of hidden in `normed` becomes the sum, rounded as it is stored, and then the norm of that.
template <class A>
void add_norm_row(const AddNorm& a, int64_t r, A* normed) {
  using V = Vec<A>;
  widen_any(a.hidden_storage, row_start<A>(a.hidden, a.hidden_storage, r), 1, a.dim, normed);
  V squares;
  with_storage(a.sum_storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (Same<A, Arithmetic<T>>::value) {
      T* sum = row_of<T>(a.sum, r);
      const void* residual = row_start<A>(a.residual, a.residual_storage, r);
      with_storage(a.residual_storage, [&](auto other) {
        using R = decltype(other);
        if constexpr (Same<A, Arithmetic<R>>::value) {
          for_lanes<V>(a.dim, [&](int64_t i, auto lanes) {
            V v = V::load(normed + i, lanes);
            if (a.residual.data != nullptr) v += V::load(static_cast<const R*>(residual) + i, lanes);
            v.store(sum + i, lanes);
            v = V::load(sum + i, lanes);
            v.store(normed + i, lanes);
            squares = fma(v, v, squares);
          });
        }
      });
    }
  });
  const V rstd(A(1) / A(__builtin_sqrt(double(sum(squares) / A(a.dim) + A(a.eps)))));
  with_storage(a.weight_storage, [&](auto element) {
    using T = decltype(element);
    if constexpr (Same<A, Arithmetic<T>>::value) {
      const T* weight = static_cast<const T*>(a.weight);
      for_lanes<V>(a.dim, [&](int64_t i, auto lanes) {
        (V::load(normed + i, lanes) * rstd * V::load(weight + i, lanes)).store(normed + i, lanes);
      });
    }
  });
}

template <class A>
void add_norm_rows(const AddNorm& a) {
  for (int64_t r = 0; r < a.rows; ++r) add_norm_row<A>(a, r, static_cast<A*>(a.normed) + r * a.dim);
}

template <class A>
void widen_to(const Widen& a) {
  using V = Vec<A>;
  A* to = static_cast<A*>(a.to);
  widen_any(a.storage, a.from, a.stride, a.count, to);
  if (!a.negative_exp) return;
  for_lanes<V>(a.count, [&](int64_t i, auto lanes) { (-exp(V::load(to + i, lanes))).store(to + i, lanes); });
}

}  // namespace

void add_norm(const AddNorm& a) { a.sum_storage == Storage::f64 ? add_norm_rows<double>(a) : add_norm_rows<float>(a); }

void widen(const Widen& a) { a.wide ? widen_to<double>(a) : widen_to<float>(a); }

}  // namespace mmkernels::MMK_ISA_NS
