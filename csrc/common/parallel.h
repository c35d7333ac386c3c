// Work shared between threads, and scratch memory of a thread.  Free of torch, so that kernels can be tested alone.
//
// Results must not depend on the number of threads: split work by the problem's own sizes, and reduce partial results
// in a fixed order afterwards (see parameter gradients in csrc/cpu/gated_rms_norm.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmkernels {

// Calls body(begin, end, context) on pieces that cover [0, count), from torch's thread pool.  One piece, in the calling
// thread, when count <= grain.  Defined in parallel.cpp over torch; a C++ test defines its own.
void parallel_pieces(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// At least `bytes` of this thread's own memory, 64-byte aligned, contents undefined (NaN in sanitizer builds), valid
// until the thread's next call.  Kept for the thread's life: fresh pages cost more than most kernels.
void* thread_scratch(size_t bytes);

}  // namespace mmkernels

#ifdef MMK_ISA_NS
namespace mmkernels::MMK_ISA_NS {

// parallel_for(count, grain, [&](int64_t begin, int64_t end) { ... });
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, const Body& body) {
  parallel_pieces(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many items make a task worth a thread: about 32 k elements (some 10 us of work, a few times a thread wake-up).
inline int64_t grain_of(int64_t elements_per_item) {
  const int64_t items = 32768 / (elements_per_item > 0 ? elements_per_item : 1);
  return items > 0 ? items : 1;
}

}  // namespace mmkernels::MMK_ISA_NS
#endif
