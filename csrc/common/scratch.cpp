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
#ifdef MMK_POISON_SCRATCH
  buffer.bytes = 0;  // anew and exact each time, so that AddressSanitizer knows where it ends
  const size_t wanted = bytes;
#else
  const size_t wanted = (bytes + 4095) / 4096 * 4096;
#endif
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer = Buffer();
    if (posix_memalign(&buffer.memory, 64, wanted) != 0) throw std::bad_alloc();
    buffer.bytes = wanted;
  }
#ifdef MMK_POISON_SCRATCH
  if (bytes > 0) std::memset(buffer.memory, 0xff, bytes);  // a NaN in every float format
#endif
  return buffer.memory;
}

}  // namespace mmkernels
