// Which instruction set the kernels run with: chosen once from cpuid, lowered by tests.
//
// A kernel is declared with MMK_KERNEL(name, Arguments) in csrc/cpu/<op>.h and defined in csrc/cpu/<op>.cpp inside
// `namespace mmkernels::MMK_ISA_NS`.  That file is compiled once per level; `mmkernels::name(arguments)` picks.
// MMK_KERNEL_BF16 declares one that is compiled for avx512_bf16 as well, where it is called with bfloat16 storage only.
#pragma once

#include <cstdint>

namespace mmkernels {

// avx512_bf16 is avx512 but for the kernels declared with MMK_KERNEL_BF16, which multiply pairs of bfloat16 numbers there.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline constexpr int kIsaCount = 4;
inline constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// Whether this build has the level and this CPU (and its operating system) can run it.
bool runs_isa(Isa level);
// The fastest of those.
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
#define MMK_KERNEL_BF16_DECLARATIONS(name, Arguments) \
  MMK_KERNEL_DECLARATIONS(name, Arguments) \
  namespace avx512_bf16 { void name(const Arguments&); }
#define MMK_KERNEL_BF16_CHOICE(name, arguments) \
  if (current_isa() == Isa::avx512_bf16 && arguments.storage == Storage::bf16) return avx512_bf16::name(arguments); \
  MMK_KERNEL_CHOICE(name, arguments)
#define MMK_KERNEL_CHOICE(name, arguments) \
  switch (current_isa()) { \
    case Isa::avx512_bf16: \
    case Isa::avx512: return avx512::name(arguments); \
    case Isa::avx2: return avx2::name(arguments); \
    case Isa::baseline: return baseline::name(arguments); \
  }
#else
#define MMK_KERNEL_DECLARATIONS(name, Arguments) \
  namespace baseline { void name(const Arguments&); }
#define MMK_KERNEL_CHOICE(name, arguments) return baseline::name(arguments);
#define MMK_KERNEL_BF16_DECLARATIONS(name, Arguments) MMK_KERNEL_DECLARATIONS(name, Arguments)
#define MMK_KERNEL_BF16_CHOICE(name, arguments) MMK_KERNEL_CHOICE(name, arguments)
#endif

#ifdef MMK_ISA_NS  // inside a kernel file: the chooser must not be emitted with that level's instructions
#define MMK_KERNEL(name, Arguments) MMK_KERNEL_DECLARATIONS(name, Arguments)
#define MMK_KERNEL_BF16(name, Arguments) MMK_KERNEL_BF16_DECLARATIONS(name, Arguments)
#else
#define MMK_KERNEL(name, Arguments) \
  MMK_KERNEL_DECLARATIONS(name, Arguments) \
  inline void name(const Arguments& arguments) { MMK_KERNEL_CHOICE(name, arguments) }
#define MMK_KERNEL_BF16(name, Arguments) \
  MMK_KERNEL_BF16_DECLARATIONS(name, Arguments) \
  inline void name(const Arguments& arguments) { MMK_KERNEL_BF16_CHOICE(name, arguments) }
#endif
