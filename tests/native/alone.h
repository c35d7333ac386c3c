// What a program needs to run kernels without torch, on buffers of exactly the right size: for AddressSanitizer and
// UBSan.  Scratch memory is NaN-poisoned in these builds, and outputs start as NaN: nothing may be left unwritten.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace mmkernels {

void parallel_pieces(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  // The smallest pieces the grain allows, last one first: kernels may not rely on an order.
  for (int64_t begin = (count - 1) / grain * grain; begin >= 0; begin -= grain) {
    body(begin, begin + grain < count ? begin + grain : count, context);
  }
}

}  // namespace mmkernels

using namespace mmkernels;

inline size_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

// `n` elements near 1 of a storage type, in memory of exactly their size.
inline std::vector<unsigned char> values(Storage storage, int64_t n) {
  std::vector<unsigned char> memory(n * bytes_of(storage));
  for (int64_t i = 0; i < n; ++i) {
    const double value = 1.0 + static_cast<double>(i % 7) / 8;
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    const uint16_t brain = static_cast<uint16_t>(word >> 16);
    const uint16_t half = static_cast<uint16_t>((word - (112u << 23)) >> 13);
    const void* source = storage == Storage::f64   ? static_cast<const void*>(&value)
                         : storage == Storage::f32 ? static_cast<const void*>(&single)
                         : storage == Storage::f16 ? static_cast<const void*>(&half)
                                                   : static_cast<const void*>(&brain);
    std::memcpy(memory.data() + i * bytes_of(storage), source, bytes_of(storage));
  }
  return memory;
}

// All ones: a NaN in every format.
inline std::vector<unsigned char> unwritten(Storage storage, int64_t n) {
  return std::vector<unsigned char>(n * bytes_of(storage), 0xff);
}

// Exits unless every element is a number: neither left as it was nor computed from poisoned scratch.
inline void require_numbers(const char* what, Storage storage, const std::vector<unsigned char>& memory) {
  const size_t size = bytes_of(storage);
  const uint64_t infinity = storage == Storage::f64   ? 0x7ff0000000000000u
                            : storage == Storage::f32 ? 0x7f800000u
                            : storage == Storage::f16 ? 0x7c00u
                                                      : 0x7f80u;
  const uint64_t magnitude = size == 8 ? ~uint64_t{0} >> 1 : (uint64_t{1} << (8 * size - 1)) - 1;
  for (size_t i = 0; i < memory.size(); i += size) {
    uint64_t word = 0;
    std::memcpy(&word, memory.data() + i, size);  // little-endian, like every processor on the build list
    if ((word & magnitude) > infinity) {
      std::printf("%s: element %zu is not a number\n", what, i / size);
      std::exit(1);
    }
  }
}

// Lowers the ISA to the level named on the command line; exits with 2 if this CPU does not have it.
inline void use_level(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0 && set_isa(static_cast<Isa>(i))) return;
  }
  std::exit(2);
}
