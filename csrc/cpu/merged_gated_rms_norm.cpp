// out = c sum over scans k of w v_k / rms(v_k), v_k = y_k silu(z), rms(v)^2 = mean(v^2) + eps over groups of channels.
// The gradients are derived in the op's README.
//
// A task owns whole tokens: y and z are read from memory once, and silu(z) is computed once for all scans.  Scans are
// added first to last.
#include "cpu/merged_gated_rms_norm.h"

#include "common/arena.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

template <class T> MMK_INLINE const T* token_of(const ScansIn& in, int64_t batch, int64_t scan, int64_t token) {
  return static_cast<const T*>(in.data) + batch * in.batch + scan * in.scan + token * in.token;
}

// ---- forward ----------------------------------------------------------------------------------------------------------

// gate = silu(z), of one group.
template <class T, class A>
MMK_INLINE void load_gate(const T* z, int64_t n, A* gate) {
  using V = Vec<A>;
  for_lanes<V>(n, [&](int64_t i, auto lanes) { silu(V::load(z + i, lanes)).store(gate + i, lanes); });
}

inline constexpr int kScansAtOnce = 4;

// rstd[s] = 1 / rms(rows[s] gate) for S scans, whose sums hide one another's latency; makes the gate of z on the way.
template <int S, class T, class A>
void statistics(const T* const* rows, const T* z, int64_t n, double eps, A* gate, A* rstd) {
  using V = Vec<A>;
  V squares[S];
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    V g(A(1));
    if (z != nullptr) {
      g = silu(V::load(z + i, lanes));
      g.store(gate + i, lanes);
    } else if (gate != nullptr) {
      g = V::load(gate + i, lanes);
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const V v = V::load(rows[s] + i, lanes) * g;
      squares[s] = fma(v, v, squares[s]);
    }
  });
  for (int s = 0; s < S; ++s) rstd[s] = A(1) / A(__builtin_sqrt(double(sum(squares[s]) / A(n) + A(eps))));
}

// The same for any number of scans.
template <class T, class A>
void all_statistics(const T* const* rows, int64_t scans, const T* z, int64_t n, double eps, A* gate, A* rstd) {
  for (int64_t k = 0; k < scans; k += kScansAtOnce, z = nullptr) {
    switch (scans - k) {
      case 1: statistics<1>(rows + k, z, n, eps, gate, rstd + k); break;
      case 2: statistics<2>(rows + k, z, n, eps, gate, rstd + k); break;
      case 3: statistics<3>(rows + k, z, n, eps, gate, rstd + k); break;
      default: statistics<kScansAtOnce>(rows + k, z, n, eps, gate, rstd + k);
    }
  }
}

// What a task of the forward pass keeps of one group.
template <class T, class A>
struct ForwardScratch {
  A *gate, *rstd;
  const T** rows;
  ForwardScratch(Arena& arena, const MergedGatedRmsNormForward& a)
      : gate(a.z.data == nullptr ? nullptr : arena.take<A>(a.group_size)), rstd(arena.take<A>(a.scans)),
        rows(arena.take<const T*>(a.scans)) {}
};

// One group of one token: y is read twice, the second time from L2 at the worst.
template <class T, class A>
void forward_group(const MergedGatedRmsNormForward& a, const ForwardScratch<T, A>& scratch, int64_t r, int64_t g) {
  using V = Vec<A>;
  const int64_t b = r / a.seqlen, t = r % a.seqlen, n = a.group_size, at = g * n, groups = a.dim / n;
  const A *gate = scratch.gate, *rstd = scratch.rstd, *w = static_cast<const A*>(a.weight) + g * a.parameter_stride;
  const T** rows = scratch.rows;
  for (int64_t k = 0; k < a.scans; ++k) rows[k] = token_of<T>(a.y, b, k, t) + at;
  const T* z = gate == nullptr ? nullptr : token_of<T>(a.z, b, 0, t) + at;
  all_statistics(rows, a.scans, z, n, a.eps, scratch.gate, scratch.rstd);
  for (int64_t k = 0; a.rstd != nullptr && k < a.scans; ++k) {
    static_cast<A*>(a.rstd)[((b * a.scans + k) * a.seqlen + t) * groups + g] = rstd[k];
  }
  T* out = static_cast<T*>(a.out) + r * a.dim + at;
  const V factor{A(a.factor)};
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    V sum;
    for (int64_t k = 0; k < a.scans; ++k) sum = fma(V::load(rows[k] + i, lanes), V(rstd[k]), sum);
    if (gate != nullptr) sum = sum * V::load(gate + i, lanes);
    (sum * V::load(w + i, lanes) * factor).store(out + i, lanes);
  });
}

template <class T>
void forward(const MergedGatedRmsNormForward& a) {
  using A = Arithmetic<T>;
  parallel_for(a.batch * a.seqlen, grain_of(a.dim * a.scans), [&](int64_t begin, int64_t end) {
    Arena measure{nullptr};
    ForwardScratch<T, A>(measure, a);
    Arena arena{static_cast<char*>(thread_scratch(measure.used))};
    const ForwardScratch<T, A> scratch(arena, a);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t g = 0; g < a.dim / a.group_size; ++g) forward_group(a, scratch, r, g);
    }
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// With u_k = v_k / rms(v_k), du = c dout w and m_k = mean(u_k du):  dv_k = (du - u_k m_k) / rms(v_k),
// dy_k = dv_k silu(z), dz = silu'(z) sum_k dv_k y_k, dw = c sum over tokens and k of dout u_k.
template <class T>
struct Backward {
  using A = Arithmetic<T>;
  using V = Vec<A>;
  const MergedGatedRmsNormBackward& a;
  int64_t n, groups;
  A *gate, *grad_normed, *kept, *grad_gate;  // of one group

  Backward(const MergedGatedRmsNormBackward& call, A* scratch, int64_t padded)
      : a(call), n(call.group_size), groups(call.dim / call.group_size),
        gate(call.z.data == nullptr ? nullptr : scratch), grad_normed(scratch + padded), kept(scratch + 2 * padded),
        grad_gate(scratch + 3 * padded) {}

  void group(int64_t r, int64_t g, A* grad_w) {
    const int64_t b = r / a.seqlen, t = r % a.seqlen, at = g * n;
    const A* w = static_cast<const A*>(a.weight) + g * a.parameter_stride;
    const T* grad = token_of<T>(a.grad_out, b, 0, t) + at;
    const V factor{A(a.factor)};
    if (gate != nullptr) load_gate(token_of<T>(a.z, b, 0, t) + at, n, gate);
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      (V::load(grad + i, lanes) * factor * V::load(w + i, lanes)).store(grad_normed + i, lanes);
      V().store(grad_gate + i, lanes);
      V().store(kept + i, lanes);
    });
    for (int64_t k = 0; k < a.scans; ++k) scan(b, k, t, g);
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      A* to = grad_w + g * a.parameter_stride + i;
      fma(V::load(grad + i, lanes) * factor, V::load(kept + i, lanes), V::load(to, lanes)).store(to, lanes);
    });
    if (gate == nullptr) return;
    const T* z = token_of<T>(a.z, b, 0, t) + at;
    T* grad_z = static_cast<T*>(a.grad_z) + r * a.dim + at;
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      const V value = V::load(z + i, lanes), s = sigmoid(value);
      (V::load(grad_gate + i, lanes) * s * fma(value, V(A(1)) - s, V(A(1)))).store(grad_z + i, lanes);
    });
  }

  // One scan of the group: dy, and its part of the sums of u (in `kept`) and of the gradient of the gate.
  void scan(int64_t b, int64_t k, int64_t t, int64_t g) {
    const int64_t row = (b * a.scans + k) * a.seqlen + t, at = g * n;
    const T* y = token_of<T>(a.y, b, k, t) + at;
    const V rstd(static_cast<const A*>(a.rstd)[row * groups + g]);
    V products;
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      V normed = V::load(y + i, lanes) * rstd;
      if (gate != nullptr) normed = normed * V::load(gate + i, lanes);
      products = fma(normed, V::load(grad_normed + i, lanes), products);
      (V::load(kept + i, lanes) + normed).store(kept + i, lanes);
    });
    const V mean(-(sum(products) / A(n)));
    T* grad_y = static_cast<T*>(a.grad_y) + row * a.dim + at;
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      const V value = V::load(y + i, lanes);
      V normed = value * rstd;
      if (gate != nullptr) normed = normed * V::load(gate + i, lanes);
      const V grad_v = fma(normed, mean, V::load(grad_normed + i, lanes)) * rstd;
      if (gate == nullptr) return grad_v.store(grad_y + i, lanes);
      (grad_v * V::load(gate + i, lanes)).store(grad_y + i, lanes);
      fma(grad_v, value, V::load(grad_gate + i, lanes)).store(grad_gate + i, lanes);
    });
  }
};

template <class T>
void backward(const MergedGatedRmsNormBackward& a) {
  using A = Arithmetic<T>;
  const int64_t rows = a.batch * a.seqlen, groups = a.dim / a.group_size;
  const int64_t block_rows = (rows + a.row_blocks - 1) / a.row_blocks, padded = (a.group_size + 15) / 16 * 16;
  parallel_for(a.row_blocks, grain_of(a.dim * a.scans * block_rows), [&](int64_t begin, int64_t end) {
    Backward<T> work(a, static_cast<A*>(thread_scratch(4 * sizeof(A) * padded)), padded);
    for (int64_t block = begin; block < end; ++block) {
      A* grad_w = static_cast<A*>(a.grad_weight) + block * a.parameter_count;
      for (int64_t i = 0; i < a.parameter_count; ++i) grad_w[i] = A(0);
      const int64_t last = (block + 1) * block_rows < rows ? (block + 1) * block_rows : rows;
      for (int64_t r = block * block_rows; r < last; ++r) {
        for (int64_t g = 0; g < groups; ++g) work.group(r, g, grad_w);
      }
    }
  });
  A* sums = static_cast<A*>(a.grad_weight);
  parallel_for(a.parameter_count, grain_of(a.row_blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 1; block < a.row_blocks; ++block) {
      for_lanes<Vec<A>>(end - begin, [&](int64_t i, auto lanes) {
        A* to = sums + begin + i;
        (Vec<A>::load(to, lanes) + Vec<A>::load(to + block * a.parameter_count, lanes)).store(to, lanes);
      });
    }
  });
}

}  // namespace

void merged_gated_rms_norm_fwd(const MergedGatedRmsNormForward& arguments) {
  with_storage(arguments.storage, [&](auto element) { forward<decltype(element)>(arguments); });
}

void merged_gated_rms_norm_bwd(const MergedGatedRmsNormBackward& arguments) {
  with_storage(arguments.storage, [&](auto element) { backward<decltype(element)>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
