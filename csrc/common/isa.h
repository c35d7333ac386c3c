// Which instruction set the kernels run with: chosen once from cpuid, lowered by tests.
//
// A kernel is declared with MMK_KERNEL(name, Arguments) in csrc/cpu/<op>.h and defined in csrc/cpu/<op>.cpp inside
// `namespace mmkernels::MMK_ISA_NS`.  That file is compiled once per level; `mmkernels::name(arguments)` picks.
#pragma once

#include <cstdint>

namespace mmkernels {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

inline constexpr int kIsaCount = 3;
inline constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512"};

// The best level that this build has and this CPU (and its operating system) can run.
Isa best_isa();
// The level in use: best_isa() unless a test lowered it.
Isa current_isa();
// False, and nothing changes, when the CPU cannot run the level.
bool set_isa(Isa level);

}  // namespace mmkernels

#if defined(__x86_64__)
#define MMK_KERNEL_DECLARATIONS(name, Arguments) \
  namespace baseline { void name(const Arguments&); } \
  namespace avx2 { void name(const Arguments&); } \
  namespace avx512 { void name(const Arguments&); }
#define MMK_KERNEL_CHOICE(name, arguments) \
  switch (current_isa()) { \
    case Isa::avx512: return avx512::name(arguments); \
    case Isa::avx2: return avx2::name(arguments); \
    case Isa::baseline: return baseline::name(arguments); \
  }
#else
#define MMK_KERNEL_DECLARATIONS(name, Arguments) \
  namespace baseline { void name(const Arguments&); }
#define MMK_KERNEL_CHOICE(name, arguments) return baseline::name(arguments);
#endif

#ifdef MMK_ISA_NS  // inside a kernel file: the chooser must not be emitted with that level's instructions
#define MMK_KERNEL(name, Arguments) MMK_KERNEL_DECLARATIONS(name, Arguments)
#else
#define MMK_KERNEL(name, Arguments) \
  MMK_KERNEL_DECLARATIONS(name, Arguments) \
  inline void name(const Arguments& arguments) { MMK_KERNEL_CHOICE(name, arguments) }
#endif
