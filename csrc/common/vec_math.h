// exp, sigmoid, silu and softplus of a Vec.
//
// Largest error of the float versions against float64 in units in the last place (ulp) of the result, at every level,
// over the whole range (tests/native/test_vec.py):
//
//   exp         1.1   exp(-inf) = 0, exp(> 88.72) = inf, subnormal results rounded once, NaN stays NaN
//   log1p_unit  2     of t in [0, 1]
//   sigmoid     2.5   also in the tails: sigmoid(-100) is exp(-100), not 0
//   silu        3     x * sigmoid(x); below -87, where the sigmoid is subnormal, within |x| * 2^-149
//   softplus    2.5   log(1 + exp(x)), and x itself above 20
//
// The double versions call libm lane by lane: double serves gradient checks, not speed.
#pragma once

#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {

// 2^n * value, -252 <= n <= 254, rounded once even where the result is subnormal.
MMK_INLINE Vec<float> scale_by_power(Vec<float> value, Vec<float> n) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, value.raw, n.raw);
#else
  using Bits = Vec<float>::Bits;
  const Bits whole = __builtin_convertvector(n.raw, Bits);
  const Bits part = whole >> 1;  // two factors, each a normal float; only the last product can round
  const auto power = [](Bits exponent) { return bit_cast<Vec<float>::Raw>((bit_cast<Words>(exponent) + 127u) << 23); };
  return value.raw * power(part) * power(whole - part);
#endif
}

// exp(x) = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2.  e^r is 1 + r + r^2 Q(r), Q the Chebyshev fit of
// degree 4 (largest error 8e-9).  ln 2 is split so that n * (its first 9 bits) is exact.
MMK_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V bounded = max(V(-104.0f), min(V(89.0f), x));  // beyond these the result is 0 or inf anyway
  const V magic(0x1.8p23f);                             // adding it leaves the nearest integer in the last bits
  const V n = fma(bounded, V(0x1.715476p0f), magic) - magic;
  const V r = fma(n, V(0x1.bd0106p-13f), fma(n, V(-0x1.63p-1f), bounded));
  V q = fma(V(0x1.6d110ap-10f), r, V(0x1.120b6ep-7f));
  q = fma(q, r, V(0x1.55551ap-5f));
  q = fma(q, r, V(0x1.5554dcp-3f));
  q = fma(q, r, V(0.5f));
  return scale_by_power(fma(q * r, r, r) + V(1.0f), n);
}

// log(1 + t) for 0 <= t <= 1, as 2 atanh(s) with s = t / (2 + t) <= 1/3: s times a fit of degree 5 in s^2.
MMK_INLINE Vec<float> log1p_unit(Vec<float> t) {
  using V = Vec<float>;
#if defined(__FMA__) || defined(__aarch64__)
  const V sum = t + V(2.0f), reciprocal = V(1.0f) / sum, s = t * reciprocal;
#else
  const V s = t / (t + V(2.0f));
#endif
  const V w = s * s;
  V p = fma(V(0x1.dba260p-4f), w, V(0x1.bc8cf8p-4f));
  p = fma(p, w, V(0x1.24c926p-3f));
  p = fma(p, w, V(0x1.9998d4p-3f));
  p = fma(p, w, V(0x1.555556p-2f));
  const V twice = s + s;
#if defined(__FMA__) || defined(__aarch64__)
  // What rounding took from s: t - s (2 + t), with 2 + t exact as sum + lost.
  const V lost = t - (sum - V(2.0f));
  const V rest = fma(-s, sum, t) - s * lost;
  return fma(twice * w, p, (rest + rest) * reciprocal) + twice;
#else
  return fma(twice * w, p, twice);
#endif
}

template <class Function>
MMK_INLINE Vec<double> by_lane(Vec<double> x, const Function& function) {
  double lane[Vec<double>::size];
  x.store(lane);
  for (double& value : lane) value = function(value);
  return Vec<double>::load(lane);
}

MMK_INLINE Vec<double> exp(Vec<double> x) {
  return by_lane(x, [](double value) { return __builtin_exp(value); });
}

MMK_INLINE Vec<double> log1p_unit(Vec<double> t) {
  return by_lane(t, [](double value) { return __builtin_log1p(value); });
}

// a / b for 1 <= b <= 2.
template <class T>
MMK_INLINE Vec<T> over_1_to_2(Vec<T> a, Vec<T> b) {
  return a / b;
}
#if defined(__AVX512F__)
// A division of 16 floats takes as long as ten products.  A reciprocal of 14 bits, and what its quotient leaves over.
template <>
MMK_INLINE Vec<float> over_1_to_2(Vec<float> a, Vec<float> b) {
  const Vec<float> reciprocal = _mm512_maskz_rcp14_ps(0xffff, b.raw), near = a * reciprocal;
  return fma(fma(-near, b, a), reciprocal, near);
}
#endif

// 1 / (1 + exp(-x)), from exp(-|x|) <= 1, which keeps its relative accuracy in the tails.
template <class T>
MMK_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one(T(1));
  const Vec<T> e = exp(-abs(x));
  return over_1_to_2(select<T>(x < Vec<T>(), e, one), one + e);
}

template <class T>
MMK_INLINE Vec<T> silu(Vec<T> x) {
  return x * sigmoid(x);
}

// max(x, 0) + log1p(exp(-|x|)), and x itself above 20, where the correction is below float32's rounding.
template <class T>
MMK_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> smooth = max(Vec<T>(), x) + log1p_unit(exp(-abs(x)));
  return select<T>(x > Vec<T>(T(20)), x, smooth);
}

}  // namespace mmkernels::MMK_ISA_NS
