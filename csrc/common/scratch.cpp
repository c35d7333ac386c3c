// Scratch memory of a thread (parallel.h).
#include "common/parallel.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace mmkernels {

namespace {

struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  static thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(buffer.memory);
    buffer.bytes = 0;
    buffer.memory = std::aligned_alloc(64, rounded);
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
#ifdef MMK_POISON_SCRATCH
  if (buffer.memory != nullptr) std::memset(buffer.memory, 0xff, buffer.bytes);  // a NaN in every float format
#endif
  return buffer.memory;
}

}  // namespace mmkernels
