// y = weight * v / rms(v) + bias, rms(v)^2 = mean(v^2) + eps over groups of channels, with the SiLU gate before (v = x
// silu(z)) or after the norm (y times silu(z)).  Mamba-2, Dao and Gu 2024, section 7; gradients derived in the op's README.
//
// A task owns whole rows: each element of x and z is read from memory once and each output written once; a group stays
// in L1 between the pass that sums its squares and the pass that writes it.
#include "cpu/gated_rms_norm.h"

#include "common/parallel.h"
#include "common/vec.h"
#include "common/vec_math.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

enum Gate { no_gate, gate_first, gate_last };

template <class A> MMK_INLINE const A* group_of(const void* parameters, int64_t offset) {
  return parameters == nullptr ? nullptr : static_cast<const A*>(parameters) + offset;
}

// ---- forward ----------------------------------------------------------------------------------------------------------

// One group: v is kept in `kept` where it cost an exponential.
template <class T, Gate gate, class A>
MMK_INLINE A forward_group(int64_t n, A eps, const T* x, const T* z, const A* w, const A* b, T* y, A* kept) {
  using V = Vec<A>;
  V squares;
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    V v = V::load(x + i, lanes);
    if constexpr (gate == gate_first) {
      v = v * silu(V::load(z + i, lanes));
      v.store(kept + i, lanes);
    }
    squares = fma(v, v, squares);
  });
  const A rstd = A(1) / A(__builtin_sqrt(double(sum(squares) / A(n) + eps)));
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    V v;
    if constexpr (gate == gate_first) {
      v = V::load(kept + i, lanes);
    } else {
      v = V::load(x + i, lanes);
    }
    v = v * V(rstd) * V::load(w + i, lanes);
    if (b != nullptr) v += V::load(b + i, lanes);
    if constexpr (gate == gate_last) v = v * silu(V::load(z + i, lanes));
    v.store(y + i, lanes);
  });
  return rstd;
}

template <class T, Gate gate>
void forward(const GatedRmsNormForward& a) {
  using A = Arithmetic<T>;
  const int64_t groups = a.dim / a.group_size;
  parallel_for(a.rows, grain_of(a.dim), [&](int64_t begin, int64_t end) {
    A* kept = gate == gate_first ? static_cast<A*>(thread_scratch(sizeof(A) * a.group_size)) : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * a.group_size, parameter = g * a.parameter_stride;
        const A rstd = forward_group<T, gate, A>(
            a.group_size, A(a.eps), row_of<T>(a.x, r) + at, gate == no_gate ? nullptr : row_of<T>(a.z, r) + at,
            group_of<A>(a.weight, parameter), group_of<A>(a.bias, parameter), row_of<T>(a.y, r) + at, kept);
        if (a.rstd != nullptr) static_cast<A*>(a.rstd)[r * groups + g] = rstd;
      }
    }
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// The pointers of one group of one row.
template <class T, class A>
struct Group {
  int64_t n;
  A rstd;
  const T *x, *z, *grad_y;
  const A *w, *b;
  T *grad_x, *grad_z;
  A *grad_w, *grad_b;       // where this block of rows sums up; null: not wanted
  A *normed, *grad_normed;  // scratch, n each: v / rms(v) and the gradient of the loss in it
};

// With u = v / rms(v) and c = mean(u * du):  dv = (du - u c) / rms(v).
template <class T, Gate gate, class A>
MMK_INLINE void backward_group(const Group<T, A>& p) {
  using V = Vec<A>;
  V products;
  for_lanes<V>(p.n, [&](int64_t i, auto lanes) {
    V grad = V::load(p.grad_y + i, lanes);
    V normed = V::load(p.x + i, lanes) * V(p.rstd);
    const V w = V::load(p.w + i, lanes);
    if constexpr (gate == gate_first) normed = normed * silu(V::load(p.z + i, lanes));
    if constexpr (gate == gate_last) {
      const V z = V::load(p.z + i, lanes), s = sigmoid(z);
      const V gated = p.b == nullptr ? normed * w : normed * w + V::load(p.b + i, lanes);
      (grad * gated * s * fma(z, V(A(1)) - s, V(A(1)))).store(p.grad_z + i, lanes);
      grad = grad * z * s;
    }
    if (p.grad_w != nullptr) fma(grad, normed, V::load(p.grad_w + i, lanes)).store(p.grad_w + i, lanes);
    if (p.grad_b != nullptr) (grad + V::load(p.grad_b + i, lanes)).store(p.grad_b + i, lanes);
    const V grad_normed = grad * w;
    products = fma(grad_normed, normed, products);
    normed.store(p.normed + i, lanes);
    grad_normed.store(p.grad_normed + i, lanes);
  });
  const A mean = sum(products) / A(p.n);
  for_lanes<V>(p.n, [&](int64_t i, auto lanes) {
    const V normed = V::load(p.normed + i, lanes);
    const V grad_v = fma(normed, V(-mean), V::load(p.grad_normed + i, lanes)) * V(p.rstd);
    if constexpr (gate == gate_first) {
      const V x = V::load(p.x + i, lanes), z = V::load(p.z + i, lanes), s = sigmoid(z);
      (grad_v * z * s).store(p.grad_x + i, lanes);
      (grad_v * x * s * fma(z, V(A(1)) - s, V(A(1)))).store(p.grad_z + i, lanes);
    } else {
      grad_v.store(p.grad_x + i, lanes);
    }
  });
}

template <class A>
MMK_INLINE A* block_sums(void* partial, int64_t block, int64_t count) {
  if (partial == nullptr) return nullptr;
  A* sums = static_cast<A*>(partial) + block * count;
  for (int64_t i = 0; i < count; ++i) sums[i] = A(0);
  return sums;
}

template <class T, Gate gate>
void backward(const GatedRmsNormBackward& a) {
  using A = Arithmetic<T>;
  const int64_t groups = a.dim / a.group_size;
  const int64_t block_rows = (a.rows + a.row_blocks - 1) / a.row_blocks;
  parallel_for(a.row_blocks, grain_of(a.dim * block_rows), [&](int64_t begin, int64_t end) {
    A* scratch = static_cast<A*>(thread_scratch(2 * sizeof(A) * a.group_size));
    for (int64_t block = begin; block < end; ++block) {
      A* grad_w = block_sums<A>(a.grad_weight, block, a.parameter_count);
      A* grad_b = block_sums<A>(a.grad_bias, block, a.parameter_count);
      const int64_t last = (block + 1) * block_rows < a.rows ? (block + 1) * block_rows : a.rows;
      for (int64_t r = block * block_rows; r < last; ++r) {
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = g * a.group_size, parameter = g * a.parameter_stride;
          Group<T, A> p;
          p.n = a.group_size;
          p.rstd = static_cast<const A*>(a.rstd)[r * groups + g];
          p.x = row_of<T>(a.x, r) + at;
          p.z = gate == no_gate ? nullptr : row_of<T>(a.z, r) + at;
          p.grad_y = row_of<T>(a.grad_y, r) + at;
          p.w = group_of<A>(a.weight, parameter);
          p.b = group_of<A>(a.bias, parameter);
          p.grad_x = row_of<T>(a.grad_x, r) + at;
          p.grad_z = gate == no_gate ? nullptr : row_of<T>(a.grad_z, r) + at;
          p.grad_w = grad_w == nullptr ? nullptr : grad_w + parameter;
          p.grad_b = grad_b == nullptr ? nullptr : grad_b + parameter;
          p.normed = scratch;
          p.grad_normed = scratch + a.group_size;
          backward_group<T, gate, A>(p);
        }
      }
    }
  });
}

// Adds up the partial sums of the blocks, first to last, into the first.
template <class A>
void reduce_blocks(void* partial, int64_t blocks, int64_t count) {
  if (partial == nullptr) return;
  A* sums = static_cast<A*>(partial);
  parallel_for(count, grain_of(blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 1; block < blocks; ++block) {
      for_lanes<Vec<A>>(end - begin, [&](int64_t i, auto lanes) {
        A* to = sums + begin + i;
        (Vec<A>::load(to, lanes) + Vec<A>::load(to + block * count, lanes)).store(to, lanes);
      });
    }
  });
}

// ---- choice of the element type and the gate ---------------------------------------------------------------------------

template <class T>
void forward_of(const GatedRmsNormForward& a) {
  if (a.z.data == nullptr) return forward<T, no_gate>(a);
  return a.norm_before_gate ? forward<T, gate_last>(a) : forward<T, gate_first>(a);
}

template <class T>
void backward_of(const GatedRmsNormBackward& a) {
  using A = Arithmetic<T>;
  if (a.z.data == nullptr) {
    backward<T, no_gate>(a);
  } else {
    a.norm_before_gate ? backward<T, gate_last>(a) : backward<T, gate_first>(a);
  }
  reduce_blocks<A>(a.grad_weight, a.row_blocks, a.parameter_count);
  reduce_blocks<A>(a.grad_bias, a.row_blocks, a.parameter_count);
}

}  // namespace

void gated_rms_norm_fwd(const GatedRmsNormForward& arguments) {
  with_storage(arguments.storage, [&](auto element) { forward_of<decltype(element)>(arguments); });
}

void gated_rms_norm_bwd(const GatedRmsNormBackward& arguments) {
  with_storage(arguments.storage, [&](auto element) { backward_of<decltype(element)>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
