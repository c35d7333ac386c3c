// Scratch memory of a thread, cut into pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmkernels::MMK_ISA_NS {
namespace {

// Hands out pieces of scratch memory.  Run over a null base first to learn the size.
struct Arena {
  char* base;
  size_t used = 0;
  template <class A> A* take(int64_t count) {
    A* piece = reinterpret_cast<A*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return base == nullptr ? nullptr : piece;
  }
};

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
