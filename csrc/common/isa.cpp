// The choice of the ISA level.  Compiled once, with baseline flags.
#include "common/isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mmkernels {

namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1u) != 0;
}
#endif

// The highest level, and whether it is the fastest as well.
struct Found {
  Isa highest = Isa::baseline, fastest = Isa::baseline;
};

Found detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!wide) return {Isa::avx2, Isa::avx2};
    if (!__builtin_cpu_supports("avx512bf16")) return {Isa::avx512, Isa::avx512};
    // A product of bfloat16 pairs counts as two multiply-adds.  Zen 4 and later issue it as often as one, Intel's server
    // cores from Sapphire Rapids on a quarter as often.
    return {Isa::avx512_bf16, __builtin_cpu_is("amd") ? Isa::avx512_bf16 : Isa::avx512};
  }
#endif
  return {};
}

const Found& found() {
  static const Found levels = detect();
  return levels;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> level{best_isa()};
  return level;
}

}  // namespace

bool runs_isa(Isa level) { return level <= found().highest; }

Isa best_isa() { return found().fastest; }

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_isa(Isa level) {
  if (!runs_isa(level)) return false;
  chosen().store(level, std::memory_order_relaxed);
  return true;
}

}  // namespace mmkernels
