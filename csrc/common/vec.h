// Vec<float>, Vec<double>: a SIMD register of the level being compiled.
//
//                      AVX512   AVX2   baseline (SSE2, NEON)
//   Vec<float>::size       16      8      4
//   Vec<double>::size       8      4      2
//
// Storage types convert on load and store: float, bf16 and half to Vec<float>, double to Vec<double>.  Stores round to
// nearest even and keep NaN, bit for bit as torch does.  `lanes` of a partial load or store is 0 <= lanes <= size; the
// memory behind it is never touched and the other lanes are 0.
//
//   for_lanes<Vec<float>>(n, [&](int64_t i, auto lanes) {    // whole vectors, then one partial
//     (fma(V::load(x + i, lanes), scale, shift)).store(y + i, lanes);
//   });
//
// A whole vector is loaded with lanes = Full{}, so that the common case compiles to plain loads.  Expressions round
// once per operator; fma(a, b, c) rounds once where the level has the instruction (not on baseline x86).
#pragma once

#include <cstdint>

#ifndef MMK_ISA_NS
#error "vec.h belongs in files that are compiled once per ISA level (csrc/cpu)"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define MMK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MMK_VECTOR_BYTES 32
#else
#define MMK_VECTOR_BYTES 16
#endif

#define MMK_INLINE inline __attribute__((always_inline))

namespace mmkernels::MMK_ISA_NS {

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };
struct Full {};

template <class T> struct VecTypes;
template <> struct VecTypes<float> {
  typedef float Raw __attribute__((vector_size(MMK_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(MMK_VECTOR_BYTES)));
  typedef uint32_t Word __attribute__((vector_size(MMK_VECTOR_BYTES)));
  typedef uint16_t Short __attribute__((vector_size(MMK_VECTOR_BYTES / 2)));
};
template <> struct VecTypes<double> {
  typedef double Raw __attribute__((vector_size(MMK_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(MMK_VECTOR_BYTES)));
};
using Words = VecTypes<float>::Word;
using Shorts = VecTypes<float>::Short;

template <class To, class From>
MMK_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- 16-bit storage -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// The maskz forms with every lane on: the plain ones draw a false "uninitialized" warning from gcc 12's own header.
// Spelled out because gcc 12 makes two halves and a shuffle of each of these conversions.
MMK_INLINE VecTypes<float>::Raw widen(bf16, Shorts bits) {
  return bit_cast<VecTypes<float>::Raw>(bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits))) << 16);
}
MMK_INLINE Shorts shorts_of(Words words) {
  return bit_cast<Shorts>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(words)));
}
#else
MMK_INLINE VecTypes<float>::Raw widen(bf16, Shorts bits) {
  return bit_cast<VecTypes<float>::Raw>(__builtin_convertvector(bits, Words) << 16);
}
MMK_INLINE Shorts shorts_of(Words words) { return __builtin_convertvector(words, Shorts); }
#endif

MMK_INLINE Shorts narrow(bf16, VecTypes<float>::Raw value) {
  const Words word = bit_cast<Words>(value);
  const Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const auto ordered = value == value;
  return shorts_of(ordered ? rounded : (Words{} + 0x7fc0u));
}

#if defined(__AVX512F__)
MMK_INLINE VecTypes<float>::Raw widen(half, Shorts bits) {
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits));
}
MMK_INLINE Shorts narrow(half, VecTypes<float>::Raw value) {
  return bit_cast<Shorts>(_mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
MMK_INLINE VecTypes<float>::Raw widen(half, Shorts bits) { return _mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
MMK_INLINE Shorts narrow(half, VecTypes<float>::Raw value) {
  return bit_cast<Shorts>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
MMK_INLINE VecTypes<float>::Raw widen(half, Shorts bits) {
  return bit_cast<VecTypes<float>::Raw>(vcvt_f32_f16(bit_cast<float16x4_t>(bits)));
}
MMK_INLINE Shorts narrow(half, VecTypes<float>::Raw value) {
  return bit_cast<Shorts>(vcvt_f16_f32(bit_cast<float32x4_t>(value)));
}
#else
// Moving the 10 + 5 bits of a half to a float's place divides its value by 2^112 (the biases differ by 112), and
// multiplying that back is exact, subnormals included.  Infinity and NaN (exponent 31) get a float's full exponent.
MMK_INLINE VecTypes<float>::Raw widen(half, Shorts bits) {
  const Words word = __builtin_convertvector(bits, Words);
  const Words magnitude = (word & 0x7fffu) << 13;
  const Words finite = bit_cast<Words>(bit_cast<VecTypes<float>::Raw>(magnitude) * 0x1p112f);
  const auto special = magnitude >= (Words{} + 0x0f800000u);
  const Words value = special ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<VecTypes<float>::Raw>(value | ((word & 0x8000u) << 16));
}

// Below 2^-14 halves are multiples of 2^-24, the spacing of floats in [0.5, 1): adding 0.5 rounds to one.  Elsewhere
// 13 bits are rounded away to nearest even; 65520 and above round to infinity.
MMK_INLINE Shorts narrow(half, VecTypes<float>::Raw value) {
  const Words word = bit_cast<Words>(value);
  const Words magnitude = word & 0x7fffffffu;
  const Words small = bit_cast<Words>(bit_cast<VecTypes<float>::Raw>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  Words result = magnitude < (Words{} + 0x38800000u) ? small : normal;
  result = magnitude >= (Words{} + 0x477ff000u) ? (Words{} + 0x7c00u) : result;
  result = magnitude > (Words{} + 0x7f800000u) ? (Words{} + 0x7e00u) : result;
  return __builtin_convertvector(result | ((word >> 16) & 0x8000u), Shorts);
}
#endif

// ---- the register ---------------------------------------------------------------------------------------------------

template <class T>
struct Vec {
  using Scalar = T;
  using Raw = typename VecTypes<T>::Raw;
  using Bits = typename VecTypes<T>::Bits;
  static constexpr int size = MMK_VECTOR_BYTES / sizeof(T);

  Raw raw;

  MMK_INLINE Vec() : raw{} {}
  MMK_INLINE Vec(Raw value) : raw(value) {}
  MMK_INLINE Vec(T value) : raw(value - Raw{}) {}  // minus, so that -0 stays -0

  MMK_INLINE static Vec load(const T* from, Full = {}) {
    Raw raw;
    __builtin_memcpy(&raw, from, sizeof(raw));
    return raw;
  }
  MMK_INLINE void store(T* to, Full = {}) const { __builtin_memcpy(to, &raw, sizeof(raw)); }
  MMK_INLINE static Vec load(const T* from, int lanes);
  MMK_INLINE void store(T* to, int lanes) const;

  template <class Half>  // bf16 or half
  MMK_INLINE static Vec load(const Half* from, Full = {}) {
    Shorts bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widen(Half{}, bits);
  }
  template <class Half>
  MMK_INLINE void store(Half* to, Full = {}) const {
    const Shorts bits = narrow(Half{}, raw);
    __builtin_memcpy(to, &bits, sizeof(bits));
  }
  template <class Half>
  MMK_INLINE static Vec load(const Half* from, int lanes);
  template <class Half>
  MMK_INLINE void store(Half* to, int lanes) const;
};

#if defined(__AVX512F__)
MMK_INLINE __mmask16 first(int lanes) { return static_cast<__mmask16>((1u << lanes) - 1u); }
template <> MMK_INLINE Vec<float> Vec<float>::load(const float* from, int lanes) {
  return _mm512_maskz_loadu_ps(first(lanes), from);
}
template <> MMK_INLINE void Vec<float>::store(float* to, int lanes) const {
  _mm512_mask_storeu_ps(to, first(lanes), raw);
}
template <> MMK_INLINE Vec<double> Vec<double>::load(const double* from, int lanes) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first(lanes)), from);
}
template <> MMK_INLINE void Vec<double>::store(double* to, int lanes) const {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first(lanes)), raw);
}
template <> template <class Half>
MMK_INLINE Vec<float> Vec<float>::load(const Half* from, int lanes) {
  return widen(Half{}, bit_cast<Shorts>(_mm256_maskz_loadu_epi16(first(lanes), from)));
}
template <> template <class Half>
MMK_INLINE void Vec<float>::store(Half* to, int lanes) const {
  _mm256_mask_storeu_epi16(to, first(lanes), bit_cast<__m256i>(narrow(Half{}, raw)));
}
#else
// Through the stack: a partial vector is the last of a row, so its cost is seldom seen.
template <class T>
MMK_INLINE Vec<T> Vec<T>::load(const T* from, int lanes) {
  T whole[size] = {};
  for (int i = 0; i < lanes; ++i) whole[i] = from[i];
  return load(whole);
}
template <class T>
MMK_INLINE void Vec<T>::store(T* to, int lanes) const {
  T whole[size];
  store(whole);
  for (int i = 0; i < lanes; ++i) to[i] = whole[i];
}
template <class T> template <class Half>
MMK_INLINE Vec<T> Vec<T>::load(const Half* from, int lanes) {
  Half whole[size] = {};
  for (int i = 0; i < lanes; ++i) whole[i] = from[i];
  return load(whole);
}
template <class T> template <class Half>
MMK_INLINE void Vec<T>::store(Half* to, int lanes) const {
  Half whole[size];
  store(whole);
  for (int i = 0; i < lanes; ++i) to[i] = whole[i];
}
#endif

// ---- arithmetic -------------------------------------------------------------------------------------------------------

template <class T> MMK_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.raw + b.raw; }
template <class T> MMK_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.raw - b.raw; }
template <class T> MMK_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.raw * b.raw; }
template <class T> MMK_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.raw / b.raw; }
template <class T> MMK_INLINE Vec<T> operator-(Vec<T> a) { return -a.raw; }
template <class T> MMK_INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) { a.raw += b.raw; return a; }

// A comparison holds in no lane with a NaN.
template <class T> MMK_INLINE typename Vec<T>::Bits operator<(Vec<T> a, Vec<T> b) { return a.raw < b.raw; }
template <class T> MMK_INLINE typename Vec<T>::Bits operator>(Vec<T> a, Vec<T> b) { return a.raw > b.raw; }
template <class T> MMK_INLINE Vec<T> select(typename Vec<T>::Bits condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes.raw : no.raw;
}

// The second argument where either is NaN: min(limit, x) and max(limit, x) keep the NaN of x.
template <class T> MMK_INLINE Vec<T> min(Vec<T> a, Vec<T> b) { return select<T>(a < b, a, b); }
template <class T> MMK_INLINE Vec<T> max(Vec<T> a, Vec<T> b) { return select<T>(a > b, a, b); }

#if defined(__AVX512F__)  // one instruction with just this rule, where gcc 12 compares and blends
template <> MMK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a.raw, b.raw); }
template <> MMK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a.raw, b.raw); }
#endif

template <class T> MMK_INLINE Vec<T> abs(Vec<T> a) {
  using Bits = typename Vec<T>::Bits;
  return bit_cast<typename Vec<T>::Raw>(bit_cast<Bits>(a.raw) & ~bit_cast<Bits>(Vec<T>(T(-0.0)).raw));
}

// a * b + c.
template <class T> MMK_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) { return a.raw * b.raw + c.raw; }
#if defined(__AVX512F__)
template <> MMK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.raw, b.raw, c.raw);
}
template <> MMK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.raw, b.raw, c.raw);
}
#elif defined(__AVX2__)
template <> MMK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.raw, b.raw, c.raw);
}
template <> MMK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.raw, b.raw, c.raw);
}
#elif defined(__aarch64__)
template <> MMK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return bit_cast<Vec<float>::Raw>(vfmaq_f32(bit_cast<float32x4_t>(c.raw), bit_cast<float32x4_t>(a.raw),
                                             bit_cast<float32x4_t>(b.raw)));
}
template <> MMK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return bit_cast<Vec<double>::Raw>(vfmaq_f64(bit_cast<float64x2_t>(c.raw), bit_cast<float64x2_t>(a.raw),
                                              bit_cast<float64x2_t>(b.raw)));
}
#endif

// The sum and the largest of all lanes, always in the same tree: lane i with lane i + size / 2, and so on.
#if defined(__clang__)
#define MMK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Vec<A>::Bits{__VA_ARGS__})
#endif

// Lane i of the result is lane i ^ step of a.
template <int step, class A> MMK_INLINE Vec<A> swapped(Vec<A> a) {
  constexpr int n = Vec<A>::size, s = step;
  if constexpr (n == 2) {
    return MMK_SHUFFLE(a.raw, a.raw, 0 ^ s, 1 ^ s);
  } else if constexpr (n == 4) {
    return MMK_SHUFFLE(a.raw, a.raw, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s);
  } else if constexpr (n == 8) {
    return MMK_SHUFFLE(a.raw, a.raw, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s);
  } else {
    return MMK_SHUFFLE(a.raw, a.raw, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s, 8 ^ s, 9 ^ s, 10 ^ s,
                       11 ^ s, 12 ^ s, 13 ^ s, 14 ^ s, 15 ^ s);
  }
}

// A tree: halves, quarters, ... pairs.
template <class T> MMK_INLINE T sum(Vec<T> a) {
  if constexpr (Vec<T>::size > 8) a += swapped<8>(a);
  if constexpr (Vec<T>::size > 4) a += swapped<4>(a);
  if constexpr (Vec<T>::size > 2) a += swapped<2>(a);
  a += swapped<1>(a);
  return a.raw[0];
}
template <class T> MMK_INLINE T max_lane(Vec<T> a) {
  T lane[Vec<T>::size];
  a.store(lane);
  for (int step = Vec<T>::size / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  }
  return lane[0];
}

// body(i, Full{}) for whole vectors, then body(i, lanes) for what is left of n, if anything.
template <class V, class Body>
MMK_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) body(i, Full{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// A single value of any storage type in the arithmetic type, and back.
template <class A, class T> MMK_INLINE A load_one(const T* from) {
  A lane[Vec<A>::size];
  Vec<A>::load(from, 1).store(lane);
  return lane[0];
}
template <class A, class T> MMK_INLINE void store_one(T* to, A value) { Vec<A>(value).store(to, 1); }

}  // namespace mmkernels::MMK_ISA_NS
