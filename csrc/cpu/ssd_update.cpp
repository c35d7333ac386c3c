// S <- exp(A dt) S + dt x B^T, y = (S C + D x) silu(z), one task a row and head, token by token.
//
// Dao and Gu, "Transformers are SSMs" (2024), equation 16.  The state is read and written once a call: a task's part
// stays in L1 or L2 between tokens.  Four rows of it share each load of B and C.
#include "cpu/ssd_update.h"

#include "common/parallel.h"
#include "common/vec_math.h"
#include "cpu/conv_rows.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// Elements (row, token, head, 0...n) of a view, in the arithmetic type.
template <class A>
void load_items(const SsdVector& view, int64_t row, int64_t token, int64_t head, int64_t n, A* to) {
  with_storage(view.storage, [&](auto element) {
    using P = decltype(element);
    const P* from = static_cast<const P*>(view.data) + row * view.row + token * view.token + head * view.head;
    widen_row(from, view.item, n, to);
  });
}
template <class A>
A load_item(const SsdVector& view, int64_t row, int64_t token, int64_t head) {
  A value;
  load_items(view, row, token, head, 1, &value);
  return value;
}

template <class A>
A step_size(const SsdUpdate& a, int64_t row, int64_t token, int64_t head) {
  using V = Vec<A>;
  V dt(load_item<A>(a.dt, row, token, head));
  if (a.dt_bias.data != nullptr) dt += V(load_item<A>(a.dt_bias, 0, 0, head));
  if (a.softplus) dt = softplus(dt);
  A lane[V::size];
  max(V(A(a.low)), min(V(A(a.high)), dt)).store(lane);
  return lane[0];
}

// R rows of the state: S <- keep S + u B^T, y = S C.  One row after the other: a state in memory is read in rising
// order, which is what the processor fetches ahead by itself (rows side by side: three times slower).
template <int R, class S, class A>
void advance_rows(S* state, int64_t stride, A keep, const A* u, const A* B, const A* C, int64_t n, A* y) {
  using V = Vec<A>;
  V out[R];
  const V decay(keep);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    S* row = state + r * stride;
    const V in(u[r]);
    for_lanes<V>(n, [&](int64_t i, auto lanes) {
      const V next = fma(V::load(row + i, lanes), decay, in * V::load(B + i, lanes));
      next.store(row + i, lanes);
      out[r] = fma(next, V::load(C + i, lanes), out[r]);
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) y[r] = sum(out[r]);
}

template <class A>
struct UpdateScratch {
  A *x, *u, *y, *gate, *B, *C, *state;

  UpdateScratch(const SsdUpdate& a, bool whole_state) {
    const int64_t states = whole_state ? a.headdim * a.dstate : 0;
    Carver carver{static_cast<char*>(thread_scratch(sizeof(A) * (4 * a.headdim + 2 * a.dstate + states) + 7 * 64))};
    x = carver.take<A>(a.headdim);
    u = carver.take<A>(a.headdim);
    y = carver.take<A>(a.headdim);
    gate = carver.take<A>(a.headdim);
    B = carver.take<A>(a.dstate);
    C = carver.take<A>(a.dstate);
    state = carver.take<A>(states);
  }
};

// y = (S C + D x) silu(z), from S C in scratch.y.
template <class T, class A>
void write_output(const SsdUpdate& a, int64_t row, int64_t token, int64_t head,
                             const UpdateScratch<A>& scratch) {
  using V = Vec<A>;
  T* y = static_cast<T*>(a.y) + ((row * a.tokens + token) * a.heads + head) * a.headdim;
  if (a.D.data != nullptr) {
    load_items(a.D, 0, 0, head, a.headdim, scratch.gate);
    for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
      fma(V::load(scratch.gate + i, lanes), V::load(scratch.x + i, lanes), V::load(scratch.y + i, lanes))
          .store(scratch.y + i, lanes);
    });
  }
  if (a.z.data != nullptr) load_items(a.z, row, token, head, a.headdim, scratch.gate);
  for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
    V out = V::load(scratch.y + i, lanes);
    if (a.z.data != nullptr) out = out * silu(V::load(scratch.gate + i, lanes));
    out.store(y + i, lanes);
  });
}

// One token of one row and head.
template <class T, class S, class A>
void advance(const SsdUpdate& a, int64_t row, int64_t token, int64_t head, S* state, int64_t stride,
                        const UpdateScratch<A>& scratch) {
  using V = Vec<A>;
  const A dt = step_size<A>(a, row, token, head);
  const A keep = exp(V(dt * load_item<A>(a.A, 0, 0, head))).raw[0];
  const int64_t group = head * a.groups / a.heads;
  load_items(a.B, row, token, group, a.dstate, scratch.B);
  load_items(a.C, row, token, group, a.dstate, scratch.C);
  load_items(a.x, row, token, head, a.headdim, scratch.x);
  for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
    (V::load(scratch.x + i, lanes) * V(dt)).store(scratch.u + i, lanes);
  });
  int64_t p = 0;
  for (; p + 4 <= a.headdim; p += 4) {
    advance_rows<4>(state + p * stride, stride, keep, scratch.u + p, scratch.B, scratch.C, a.dstate, scratch.y + p);
  }
  for (; p < a.headdim; ++p) {
    advance_rows<1>(state + p * stride, stride, keep, scratch.u + p, scratch.B, scratch.C, a.dstate, scratch.y + p);
  }
  write_output<T>(a, row, token, head, scratch);
}

template <class T, class S>
void update_head(const SsdUpdate& a, int64_t row, int64_t head) {
  using A = Arithmetic<T>;
  const int64_t slot = a.slots == nullptr ? row : a.slots[row];
  if (slot < 0) {
    for (int64_t token = 0; token < a.tokens; ++token) {
      T* y = static_cast<T*>(a.y) + ((row * a.tokens + token) * a.heads + head) * a.headdim;
      __builtin_memset(static_cast<void*>(y), 0, sizeof(T) * a.headdim);
    }
    return;
  }
  S* state = static_cast<S*>(a.state) + slot * a.state_slot + head * a.state_head;
  // Several tokens must not round a 16-bit state between them.
  const bool whole = !Same<S, A>::value && a.tokens > 1;
  const UpdateScratch<A> scratch(a, whole);
  if (!whole) {
    for (int64_t token = 0; token < a.tokens; ++token) advance<T>(a, row, token, head, state, a.state_row, scratch);
    return;
  }
  for (int64_t p = 0; p < a.headdim; ++p) {
    convert_row(state + p * a.state_row, a.dstate, scratch.state + p * a.dstate);
  }
  for (int64_t token = 0; token < a.tokens; ++token) advance<T>(a, row, token, head, scratch.state, a.dstate, scratch);
  for (int64_t p = 0; p < a.headdim; ++p) {
    convert_row(scratch.state + p * a.dstate, a.dstate, state + p * a.state_row);
  }
}

}  // namespace

void ssd_update(const SsdUpdate& a) {
  with_storage(a.storage, [&](auto element) {
    with_storage(a.state_storage, [&](auto state_element) {
      using T = decltype(element);
      using S = decltype(state_element);
      if constexpr (Same<Arithmetic<T>, Arithmetic<S>>::value) {
        parallel_for(a.batch * a.heads, grain_of(a.headdim * a.dstate * a.tokens), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) update_head<T, S>(a, i / a.heads, i % a.heads);
        });
      }
    });
  });
}

}  // namespace mmkernels::MMK_ISA_NS
