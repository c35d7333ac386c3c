// C entry points over Vec, for test_vec.py.  Compiled once per ISA level.
#include "common/vec.h"
#include "common/vec_math.h"

using namespace mmkernels::MMK_ISA_NS;

namespace {

template <class T, class Function>
void map(const T* in, T* out, int64_t n, const Function& function) {
  for_lanes<Vec<T>>(n, [&](int64_t i, auto lanes) { function(Vec<T>::load(in + i, lanes)).store(out + i, lanes); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define MAPPED(name) \
  EXPORT void name##_f32(const float* in, float* out, int64_t n) { map(in, out, n, [](auto v) { return name(v); }); } \
  EXPORT void name##_f64(const double* in, double* out, int64_t n) { map(in, out, n, [](auto v) { return name(v); }); }

MAPPED(exp)
MAPPED(log1p_unit)
MAPPED(sigmoid)
MAPPED(silu)
MAPPED(softplus)
MAPPED(abs)

EXPORT int size_f32() { return Vec<float>::size; }

EXPORT void widen_bf16(const bf16* in, float* out, int64_t n) {
  for_lanes<Vec<float>>(n, [&](int64_t i, auto lanes) { Vec<float>::load(in + i, lanes).store(out + i, lanes); });
}
EXPORT void widen_f16(const half* in, float* out, int64_t n) {
  for_lanes<Vec<float>>(n, [&](int64_t i, auto lanes) { Vec<float>::load(in + i, lanes).store(out + i, lanes); });
}
EXPORT void narrow_bf16(const float* in, bf16* out, int64_t n) {
  for_lanes<Vec<float>>(n, [&](int64_t i, auto lanes) { Vec<float>::load(in + i, lanes).store(out + i, lanes); });
}
EXPORT void narrow_f16(const float* in, half* out, int64_t n) {
  for_lanes<Vec<float>>(n, [&](int64_t i, auto lanes) { Vec<float>::load(in + i, lanes).store(out + i, lanes); });
}

// out: {sum of all lanes of one vector, largest, fma(a, b, c) of its first lane, max(0, a), min(0, a)}
EXPORT void lanes_f32(const float* a, const float* b, const float* c, float* out) {
  using V = Vec<float>;
  const V x = V::load(a);
  out[0] = sum(x);
  out[1] = max_lane(x);
  V fused = fma(x, V::load(b), V::load(c)), larger = max(V(), x), smaller = min(V(), x);
  fused.store(out + 2, 1);
  larger.store(out + 3, 1);
  smaller.store(out + 4, 1);
}

// Loads and stores `lanes` elements between buffers that end exactly there.
EXPORT void partial_f32(const float* in, float* out, int lanes) { Vec<float>::load(in, lanes).store(out, lanes); }
EXPORT void partial_f16(const half* in, half* out, int lanes) { Vec<float>::load(in, lanes).store(out, lanes); }
EXPORT void partial_bf16(const bf16* in, bf16* out, int lanes) { Vec<float>::load(in, lanes).store(out, lanes); }
EXPORT void partial_f64(const double* in, double* out, int lanes) { Vec<double>::load(in, lanes).store(out, lanes); }
// The lanes beyond a partial load.
EXPORT void padding_f32(const float* in, float* whole, int lanes) { Vec<float>::load(in, lanes).store(whole); }
