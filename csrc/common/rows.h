// How kernels see tensors: an element type and rows of consecutive elements.  Free of torch.
#pragma once

#include <cstdint>

namespace mmkernels {

// How elements are stored.  Arithmetic is float, and double for f64.
enum class Storage : int { f32, bf16, f16, f64 };

// A matrix of rows of consecutive elements; `stride` elements lie between the starts of two rows.
struct RowsIn {
  const void* data = nullptr;
  int64_t stride = 0;
};
struct RowsOut {
  void* data = nullptr;
  int64_t stride = 0;
};

}  // namespace mmkernels

#ifdef MMK_ISA_NS
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {

template <class T> struct ArithmeticOf { using type = float; };
template <> struct ArithmeticOf<double> { using type = double; };
// What a kernel computes in when its elements are stored as T.
template <class T> using Arithmetic = typename ArithmeticOf<T>::type;

template <class T> MMK_INLINE const T* row_of(const RowsIn& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + r * rows.stride;
}
template <class T> MMK_INLINE T* row_of(const RowsOut& rows, int64_t r) {
  return static_cast<T*>(rows.data) + r * rows.stride;
}

// Calls work(T{}) with the element type: with_storage(s, [&](auto element) { run<decltype(element)>(); });
template <class Work>
MMK_INLINE void with_storage([[maybe_unused]] Storage storage, const Work& work) {
#if defined(__AVX512BF16__)
  return work(bf16{});  // MMK_KERNEL_BF16 enters that level for nothing else
#else
  switch (storage) {
    case Storage::f32: return work(float{});
    case Storage::bf16: return work(bf16{});
    case Storage::f16: return work(half{});
    case Storage::f64: return work(double{});
  }
#endif
}

}  // namespace mmkernels::MMK_ISA_NS
#endif
