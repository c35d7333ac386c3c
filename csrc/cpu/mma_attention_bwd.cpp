// Backward of attention over live tiles (Dao et al. 2022, section 3 and appendix B.4), from the inputs, out and lse.
//
// With g the gradient of out and e that of lse, per tile:
//   p_ij = 2^(s_ij - lse_i),  dp_ij = g_i . v_j,  ds_ij = p_ij (dp_ij - delta_i),  delta_i = g_i . out_i - e_i
//   dv_j += sum_i p_ij g_i,   dk_j += sum_i ds_ij q_i scale,   dq_i += sum_j ds_ij k_j scale
// A task owns a head of keys and the query heads that share it, one after another, so that each sum has one owner and
// one order.  The mass of keys is here too: it is a sum over queries of the same p.
#include "cpu/mma_attention_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// What a row subtracts from its scores before 2^x: lse in base 2; infinity for a row without keys, whose p are then 0.
template <class A>
A shift_of(A lse) {
  const A infinity = static_cast<A>(__builtin_inf());
  return lse == -infinity ? infinity : lse * static_cast<A>(kLog2E);
}

template <class T>
struct Backward {
  using A = Arithmetic<T>;
  using V = Vec<A>;

  const AttentionBackward& a;
  int64_t width;
  A *keys, *values;                 // of a block of keys
  A *turned_q, *turned_g, *q, *g;   // of a tile of queries: [headdim][query] (q scaled), and [query][headdim]
  A *shift, *delta, *p, *ds;
  A *grad_q, *grad_k, *grad_v;      // sums: of a query head, and of the head of keys
  Rows96* rows;
  Mask<A>* mask;
  bool packed[kKeyBlock / kKeyTile];

  Backward(Arena& arena, const AttentionBackward& call) : a(call), width(padded<A>(a.headdim)) {
    const int64_t block = least(kKeyBlock, a.klen);
    keys = arena.take<A>(block * width), values = arena.take<A>(block * width);
    A** const turned[] = {&turned_q, &turned_g};
    for (A** one : turned) *one = arena.take<A>(a.headdim * kQueryTile);
    A** const straight[] = {&q, &g};
    for (A** one : straight) *one = arena.take<A>(kQueryTile * width);
    A** const squares[] = {&p, &ds};
    for (A** one : squares) *one = arena.take<A>(kKeyTile * kQueryTile);
    shift = arena.take<A>(kQueryTile), delta = arena.take<A>(kQueryTile);
    grad_q = arena.take<A>(a.qlen * width);
    grad_k = arena.take<A>(a.klen * width), grad_v = arena.take<A>(a.klen * width);
    rows = arena.take<Rows96>(1), mask = arena.take<Mask<A>>(1);
  }

  void run(const AttentionTask& task) {
    clear(grad_k, a.klen), clear(grad_v, a.klen);
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t h = 0; h < group; ++h) {
      clear(grad_q, a.qlen);
      for (int64_t block = 0; block < a.klen; block += kKeyBlock) {
        for (bool& done : packed) done = false;
        for (int64_t r = 0; r < a.qlen; r += kQueryTile) {
          rows->take(a, task.batch, task.kv_head, h * a.qlen + r, least(kQueryTile, a.qlen - r));
          one_tile(task, r, block, least(block + kKeyBlock, a.klen));
        }
      }
      write(grad_q, a.qlen, a.scale, a.grad_q, a.heads, task.batch, task.kv_head * group + h);
    }
    write(grad_k, a.klen, a.scale, a.grad_k, a.kv_heads, task.batch, task.kv_head);
    write(grad_v, a.klen, 1, a.grad_v, a.kv_heads, task.batch, task.kv_head);
  }

  void clear(A* to, int64_t count) const {
    for (int64_t i = 0; i < count * width; i += V::size) V().store(to + i);
  }

  void write(const A* from, int64_t count, double factor, void* to, int64_t heads, int64_t batch, int64_t head) const {
    const V by(static_cast<A>(factor));
    for (int64_t r = 0; r < count; ++r) {
      T* row = static_cast<T*>(to) + ((batch * count + r) * heads + head) * a.headdim;
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        (V::load(from + r * width + i) * by).store(row + i, lanes);
      });
    }
  }

  // All keys block .. end for the queries in `rows`, from r on.
  void one_tile(const AttentionTask& task, int64_t r, int64_t block, int64_t end) {
    bool loaded = false;
    for (int64_t key = block; key < end; key += kKeyTile) {
      const int64_t n = least(kKeyTile, end - key), offset = (key - block) * width;
      if (!mask->open(a, *rows, key, n)) continue;
      if (!loaded) load_queries(), loaded = true;
      bool& done = packed[(key - block) / kKeyTile];
      if (!done) {
        pack_rows(at<T>(a.k, task.batch, key, task.kv_head), a.k.token, n, a.headdim, keys + offset, width);
        pack_rows(at<T>(a.v, task.batch, key, task.kv_head), a.v.token, n, a.headdim, values + offset, width);
        done = true;
      }
      step(n, keys + offset, values + offset, grad_q + r * width, grad_k + key * width, grad_v + key * width);
    }
  }

  void load_queries() {
    const auto row = [&](const AttentionIn& in) {
      return [&](int64_t r) { return at<T>(in, rows->batch, rows->token[r], rows->head[r]); };
    };
    const auto q_row = row(a.q), g_row = row(a.grad_out), out_row = row(a.out);
    pack_transposed(rows->count, a.headdim, static_cast<A>(a.scale * kLog2E), turned_q, q_row);
    if (a.grad_out.data != nullptr) pack_transposed(rows->count, a.headdim, A(1), turned_g, g_row);
    for (int64_t r = 0; r < kQueryTile; ++r) {
      shift[r] = static_cast<A>(__builtin_inf()), delta[r] = 0;
      if (r >= rows->count) continue;
      const int64_t by_head = (rows->batch * a.heads + rows->head[r]) * a.qlen + rows->token[r];
      shift[r] = shift_of(static_cast<const A*>(a.lse)[by_head]);
      pack_rows(q_row(r), 0, 1, a.headdim, q + r * width, width);
      // A row without keys has no part in anything, whatever gradient comes in for its lse of -inf.
      if (a.grad_lse != nullptr && shift[r] < static_cast<A>(__builtin_inf())) {
        delta[r] = -static_cast<const A*>(a.grad_lse)[by_head];
      }
      if (a.grad_out.data == nullptr) continue;
      pack_rows(g_row(r), 0, 1, a.headdim, g + r * width, width);
      V dot;
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        dot = fma(V::load(g + r * width + i), V::load(out_row(r) + i, lanes), dot);
      });
      delta[r] += sum(dot);
    }
  }

  void step(int64_t n, const A* k, const A* v, A* dq, A* dk, A* dv) {
    const auto live_scores = [&](int64_t key, int64_t some) { return mask->scores_part(key, some, a.headdim); };
    const auto live_queries = [&](int64_t key, int64_t some) { return mask->queries_part(key, some, rows->count); };
    const bool outer = a.grad_out.data != nullptr;
    const auto by_keys = [&](const A* left, const A* right, A* to) {
      multiply_parts<A, true>(scores_of(n, a.headdim, left, width, right, to), live_scores);
    };
    by_keys(k, turned_q, p);
    if (outer) by_keys(v, turned_g, ds);
    for (int64_t i = 0; i < Mask<A>::kVectors; ++i) soften(i, n, outer);
    if (outer) {
      Product<A> to_v{n, a.headdim, rows->count, p, kQueryTile, 1, g, width, dv, width};
      to_v.start = dv;
      multiply_parts<A, true>(to_v, live_queries);
    }
    Product<A> to_k{n, a.headdim, rows->count, ds, kQueryTile, 1, q, width, dk, width};
    to_k.start = dk;
    multiply_parts<A, true>(to_k, live_queries);
    Product<A> to_q{rows->count, a.headdim, n, ds, 1, kQueryTile, k, width, dq, width};
    to_q.start = dq;
    multiply_parts<A, false>(to_q, [&](int64_t row, int64_t some) { return mask->keys_part(row, some); });
  }

  // Scores to p and dp to ds, in place, of one vector of queries.
  void soften(int64_t vector, int64_t n, bool outer) {
    const int64_t lo = least(mask->vector_lo[vector], n), hi = most(lo, mask->vector_hi[vector]);
    mask->apply(*rows, vector, p);
    A *to_p = p + vector * V::size, *to_ds = ds + vector * V::size;
    const V subtrahend = V::load(shift + vector * V::size), inner = V::load(delta + vector * V::size);
    for (int64_t j = lo; j < hi; ++j) {
      A *at_p = to_p + j * kQueryTile, *at_ds = to_ds + j * kQueryTile;
      const V share = power_of_two(V::load(at_p) - subtrahend);
      share.store(at_p);
      (share * ((outer ? V::load(at_ds) : V()) - inner)).store(at_ds);
    }
    for (int64_t j = 0; j < lo; ++j) V().store(to_ds + j * kQueryTile);
    for (int64_t j = hi; j < n; ++j) V().store(to_ds + j * kQueryTile);
  }
};

template <class T>
struct MassOf {
  using A = Arithmetic<T>;
  using V = Vec<A>;

  const AttentionMass& a;
  int64_t width;
  A *keys, *queries, *scores, *shift, *weight, *sums;  // sums: a vector a key
  Rows96* rows;
  Mask<A>* mask;

  MassOf(Arena& arena, const AttentionMass& call) : a(call), width(padded<A>(a.headdim)) {
    const int64_t block = least(kKeyBlock, a.klen);
    keys = arena.take<A>(block * width), queries = arena.take<A>(a.headdim * kQueryTile);
    scores = arena.take<A>(kKeyTile * kQueryTile), sums = arena.take<A>(block * V::size);
    shift = arena.take<A>(kQueryTile), weight = arena.take<A>(kQueryTile);
    rows = arena.take<Rows96>(1), mask = arena.take<Mask<A>>(1);
  }

  void run(const AttentionTask& task) {
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t block = task.first_key; block < task.last_key; block += kKeyBlock) {
      const int64_t n = least(kKeyBlock, task.last_key - block);
      pack_rows(at<T>(a.k, task.batch, block, task.kv_head), a.k.token, n, a.headdim, keys, width);
      for (int64_t h = 0; h < group; ++h) {
        const int64_t head = task.kv_head * group + h;
        for (int64_t j = 0; j < n; ++j) V().store(sums + j * V::size);
        for (int64_t r = 0; r < a.qlen; r += kQueryTile) {
          rows->take(a, task.batch, task.kv_head, h * a.qlen + r, least(kQueryTile, a.qlen - r));
          if (load_queries()) one_tile(block, n);
        }
        A* to = static_cast<A*>(a.mass) + (task.batch * a.heads + head) * a.klen + block;
        for (int64_t j = 0; j < n; ++j) to[j] = sum(V::load(sums + j * V::size));
      }
    }
  }

  // False if no row of the tile counts.
  bool load_queries() {
    bool counts = false;
    for (int64_t r = 0; r < kQueryTile; ++r) {
      shift[r] = static_cast<A>(__builtin_inf()), weight[r] = 0;
      if (r >= rows->count) continue;
      const A of_row = static_cast<const A*>(a.weights)[rows->batch * a.qlen + rows->token[r]];
      if (of_row == A(0)) continue;
      weight[r] = of_row, counts = true;
      const int64_t by_head = (rows->batch * a.heads + rows->head[r]) * a.qlen + rows->token[r];
      shift[r] = shift_of(static_cast<const A*>(a.lse)[by_head]);
    }
    if (counts) {
      pack_transposed(rows->count, a.headdim, static_cast<A>(a.scale * kLog2E), queries, [&](int64_t r) {
        return at<T>(a.q, rows->batch, rows->token[r], rows->head[r]);
      });
    }
    return counts;
  }

  void one_tile(int64_t block, int64_t count) {
    for (int64_t key = 0; key < count; key += kKeyTile) {
      const int64_t n = least(kKeyTile, count - key);
      if (!mask->open(a, *rows, block + key, n)) continue;
      multiply_parts<A, true>(
          scores_of(n, a.headdim, keys + key * width, width, queries, scores),
          [&](int64_t from, int64_t some) { return mask->scores_part(from, some, a.headdim); });
      for (int64_t v = 0; v < Mask<A>::kVectors; ++v) {
        if (mask->vector_lo[v] >= mask->vector_hi[v]) continue;
        mask->apply(*rows, v, scores);
        const V subtrahend = V::load(shift + v * V::size), by = V::load(weight + v * V::size);
        for (int64_t j = mask->vector_lo[v]; j < mask->vector_hi[v]; ++j) {
          A* to = sums + (key + j) * V::size;
          fma(by, power_of_two(V::load(scores + j * kQueryTile + v * V::size) - subtrahend), V::load(to)).store(to);
        }
      }
    }
  }
};

}  // namespace

void mma_attention_bwd(const AttentionBackward& arguments) {
  with_storage(arguments.storage, [&](auto element) { for_tasks<Backward<decltype(element)>>(arguments); });
}

void mma_attention_mass(const AttentionMass& arguments) {
  with_storage(arguments.storage, [&](auto element) { for_tasks<MassOf<decltype(element)>>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
