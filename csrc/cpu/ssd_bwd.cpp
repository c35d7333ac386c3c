// Backward of the state-space scan, from the inputs alone: states are computed again.  The formulas are in ssd_chunk.h.
//
// With dR' the gradient of the state that leaves a chunk, e_ij = e^{s_i - s_j} and W_ij = e_ij dt_j (dY_i . x_j):
//   dx_j  = dt_j du_j + D dY_j,   du_j = e^{s_T - s_j} dR' B_j + sum_{i >= j} (B_j . C_i) e_ij dY_i
//   dB_j  = sum over heads e^{s_T - s_j} dt_j dR'^T x_j + sum_{i >= j} W_ij C_i
//   dC_i  = sum over heads e^{s_i} R^T dY_i             + sum_{j <= i} W_ij B_j
//   dR    = e^{s_T} dR' + sum_i e^{s_i} dY_i C_i^T
//   da_k  = e^{s_T} <R, dR'> + sum_{i >= k} r_i + sum_{j < k} q_j + sum_{j < k <= i} W_ij (B_j . C_i),
//           r_i = C_i . e^{s_i} R^T dY_i,  q_j = dt_j x_j . e^{s_T - s_j} dR' B_j
//   ddt_k = x_k . du_k + A da_k
// da_k sums exactly the terms that decay across token k; a difference of larger sums would cancel.
//
// A task owns some heads of one group of one row.  It walks the row forward to find the state that enters each chunk,
// as [headdim][dstate], then backward.  dB and dC are summed over its heads in cache, over tasks by ssd_sum_blocks.
//
// Of a row too long for the states of all its chunks, only those that enter every sqrt(chunks)-th chunk are kept on the
// first walk; the others are found again, segment by segment.  One more product of six, memory of sqrt(seqlen).
#include "cpu/ssd_factors.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

inline constexpr size_t kKeptStates = size_t{64} << 20;  // bytes a task may spend on the states of all its chunks

// Chunks whose states are kept at once.
inline int64_t segment_of(int64_t chunks, size_t bytes_each) {
  if (static_cast<size_t>(chunks) * bytes_each <= kKeptStates) return chunks < 1 ? 1 : chunks;
  int64_t root = 1;
  while (root * root < chunks) ++root;
  return root;
}

template <class T>
struct Backward {
  using A = Arithmetic<T>;
  using E = Element<T>;
  using V = Vec<A>;

  const SsdBackward& a;
  const int64_t width, most_heads, state_size, segment;
  Keys<A> keys;
  StateFactors<E> factors;
  Decays<A> decays;
  A *x, *stepped_x, *weighted_x;  // x, dt_j x_j, e^{s_T - s_j} dt_j x_j
  A *dy, *grown_dy, *dy_turned;  // dY, e^{s_i} dY_i, and dY as [headdim][tokens]
  A *products, *weights;       // dt_j x_j . dY_i; (B_j . C_i) e_ij
  A* pair_sums;                // W summed over heads
  A *crossing, *lost;          // running sums over j of W_ij (B_j . C_i), and what rounding took from them
  A *du, *from_state;          // du; e^{s_i} R^T dY_i
  A *x_du, *q, *r, *w;         // sums of each token
  A* by_row;                   // and of each row of a state
  A *grad_B, *grad_C;
  A *gradients, *turned;       // dR' of each head, as [headdim][dstate] and as [dstate][headdim]
  A* states;                   // entering each chunk of a segment, of each head, as [headdim][dstate]
  A* borders;                  // entering the first chunk of each segment
  bool* empty;                 // of each head: dR' is zero
  double* grad_D;              // (heads, headdim)
  double *grad_A, *grad_bias;  // (heads)
  Upcoming upcoming;

  Backward(Arena& arena, const SsdBackward& call)
      : a(call), width(padded<A>(a.headdim)), most_heads((a.heads / a.groups + a.head_blocks - 1) / a.head_blocks),
        state_size(a.headdim * padded<A>(a.dstate)),
        segment(segment_of(a.most_chunks, static_cast<size_t>(most_heads * state_size) * sizeof(A))), keys(arena, a),
        factors(arena, a, keys.row, width), decays(arena, keys.pair_row),
        upcoming(arena, 8 * a.chunk_tokens + a.headdim) {
    const int64_t tokens = even(a.chunk_tokens), pairs = keys.pair_row;
    A** const by_channel[] = {&x, &stepped_x, &weighted_x, &dy, &grown_dy, &du};
    for (A** rows : by_channel) *rows = arena.take<A>(tokens * width);
    A** const by_token[] = {&products, &weights, &pair_sums};
    for (A** rows : by_token) *rows = arena.take<A>(tokens * pairs);
    A** const by_state[] = {&from_state, &grad_B, &grad_C};
    for (A** rows : by_state) *rows = arena.take<A>(tokens * keys.row);
    A** const one_each[] = {&x_du, &q, &r, &w, &crossing, &lost};
    for (A** values : one_each) *values = arena.take<A>(pairs);
    by_row = arena.take<A>(width);
    dy_turned = arena.take<A>(a.headdim * pairs);
    gradients = arena.take<A>(most_heads * state_size);
    turned = arena.take<A>(most_heads * a.dstate * width);
    empty = arena.take<bool>(most_heads);
    grad_D = arena.take<double>(most_heads * a.headdim);
    grad_A = arena.take<double>(most_heads);
    grad_bias = arena.take<double>(most_heads);
    states = arena.take<A>(segment * most_heads * state_size);
    borders = arena.take<A>((a.most_chunks / segment + 1) * most_heads * state_size);
    factors.use(keys.B, keys.C, weighted_x, grown_dy);
  }

  // Of head 0; those of the other heads follow, state_size apart.
  A* state(int64_t number) const { return states + number * most_heads * state_size; }
  A* border(int64_t number) const { return borders + number * most_heads * state_size; }
  A* gradient(int64_t h) const { return gradients + h * state_size; }
  A* turned_gradient(int64_t h) const { return turned + h * a.dstate * width; }

  void run(const Unit& unit) {
    const SsdRow& row = *unit.row;
    find_borders(unit);
    for (int64_t h = 0; h < unit.heads; ++h) leave(unit, h);
    clear(grad_A, unit.heads), clear(grad_bias, unit.heads);
    if (a.grad_D != nullptr) clear(grad_D, unit.heads * a.headdim);
    int64_t end = row.end;
    for (int64_t number = (row.end - row.begin - 1) / segment; end > row.begin; --number) {
      const int64_t begin = row.begin + number * segment;
      find_states(unit, begin, end);
      for (int64_t c = end - 1; c >= begin; --c) one_chunk(unit, a.chunk[c], c - begin);
      end = begin;
    }
    for (int64_t h = 0; h < unit.heads; ++h) store_sums(unit, h);
  }

  // ---- what is wanted next ----

  template <class Element>
  void multiply_ahead(const Product<Element>& p) {
    multiply(p, [this] { upcoming.fetch_some(); });
  }

  template <class Row>
  void want(const SsdIn& in, int64_t batch, const Walk& token, int64_t tokens, int64_t head, int64_t count) {
    if (in.data == nullptr) return;
    const Row* from = head_of<Row>(in, batch, head);
    for (int64_t t = 0; t < tokens; ++t) upcoming.read(from + token[t] * in.token, count * sizeof(Row));
  }
  template <class Row>
  void want_output(void* out, int64_t batch, const Walk& token, int64_t tokens, int64_t head) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = dense(a, batch, token[t], head, a.heads, a.headdim);
      upcoming.write(static_cast<Row*>(out) + at, a.headdim * sizeof(Row));
    }
  }
  void want_keys(const Unit& unit, const SsdChunk& chunk) {
    const Walk token(a, chunk);
    want<T>(a.B, unit.row->batch, token, chunk.length, unit.group, a.dstate);
    want<T>(a.C, unit.row->batch, token, chunk.length, unit.group, a.dstate);
    want<A>(a.dt, unit.row->batch, token, chunk.length, unit.first_head, 1);
  }

  // All of head h and a chunk, and the state that enters it.
  void want_head(const Unit& unit, const SsdChunk& chunk, int64_t h, const A* entering) {
    const int64_t batch = unit.row->batch, head = unit.first_head + h, tokens = chunk.length;
    const Walk token(a, chunk);
    want<T>(a.x, batch, token, tokens, head, a.headdim);
    want<T>(a.grad_y, batch, token, tokens, head, a.headdim);
    want_output<T>(a.grad_x, batch, token, tokens, head);
    for (int64_t i = 0; i < a.headdim && chunk.entry != SsdEntry::zero; ++i) {
      upcoming.read(entering + i * keys.row, a.dstate * sizeof(A));
    }
    if (a.z.data == nullptr) return;
    want<T>(a.z, batch, token, tokens, head, a.headdim);
    want_output<T>(a.grad_z, batch, token, tokens, head);
  }

  // ---- the states, forward ----

  // The states that enter the segments, the first one's included.
  void find_borders(const Unit& unit) {
    const SsdRow& row = *unit.row;
    if (row.begin < row.end && a.chunk[row.begin].entry == SsdEntry::initial) {
      for (int64_t h = 0; h < unit.heads; ++h) {
        pack(state_of<A>(a, a.initial, unit.index, unit.first_head + h), a.dstate, a.headdim, a.dstate,
             border(0) + h * state_size, keys.row);
      }
    }
    const int64_t last = (row.end - row.begin - 1) / segment * segment;
    for (int64_t i = 0; i < last; ++i) {
      A* const to = border(i / segment + 1);
      advance(unit, row.begin + i, i % segment == 0 ? border(i / segment) : to, to);
    }
  }

  // The states that enter the chunks [begin, end) of a segment.
  void find_states(const Unit& unit, int64_t begin, int64_t end) {
    if (a.chunk[begin].entry != SsdEntry::zero) {
      const A* from = border((begin - unit.row->begin) / segment);
      for (int64_t i = 0; i < unit.heads * state_size; i += V::size) V::load(from + i).store(state(0) + i);
    }
    for (int64_t c = begin; c + 1 < end; ++c) advance(unit, c, state(c - begin), state(c + 1 - begin));
  }

  // From the states that enter chunk c to those that enter the next, if it takes any.  `to` may be `from`.
  void advance(const Unit& unit, int64_t c, const A* from, A* to) {
    const SsdChunk& chunk = a.chunk[c];
    if (a.chunk[c + 1].entry != SsdEntry::carried) return;
    factors.template load_B<T>(a, chunk, unit.row->batch, unit.group, keys.row);
    for (int64_t h = 0; h < unit.heads; ++h, from += state_size, to += state_size) {
      upcoming.clear();
      if (h + 1 < unit.heads) {
        want<T>(a.x, unit.row->batch, Walk(a, chunk), chunk.length, unit.first_head + h + 1, a.headdim);
        for (int64_t i = 0; i < a.headdim; ++i) upcoming.write(to + state_size + i * keys.row, a.dstate * sizeof(A));
      }
      decays.compute(a, chunk, unit.row->batch, unit.first_head + h);
      load_weighted_x(chunk, unit.row->batch, unit.first_head + h);
      Product<E> update{a.headdim, a.dstate, depth_of<E>(chunk.length), factors.weighted_tokens, 1, width,
                        factors.B_tokens, keys.row, to, keys.row};
      if (chunk.entry != SsdEntry::zero) update.start = from, update.scale = &decays.all;
      multiply_ahead(update);
    }
  }

  void load_weighted_x(const SsdChunk& chunk, int64_t batch, int64_t head) {
    const T* rows = head_of<T>(a.x, batch, head);
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; t += 2) {
      const bool both = t + 1 < chunk.length;
      const T *from = rows + token[t] * a.x.token, *next = both ? rows + token[t + 1] * a.x.token : from;
      const V dt(decays.dt[t]), left(decays.left[t]);
      const V next_dt(both ? decays.dt[t + 1] : A(0)), next_left(both ? decays.left[t + 1] : A(0));
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        const V odd = both ? V::load(next + i, lanes) * next_dt * next_left : V();
        put(factors.weighted_tokens, width, t, i, V::load(from + i, lanes) * dt * left, odd);
      });
    }
  }

  void load_x(const SsdChunk& chunk, int64_t batch, int64_t head) {
    const T* rows = head_of<T>(a.x, batch, head);
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; ++t) {
      const T* from = rows + token[t] * a.x.token;
      const V dt(decays.dt[t]), left(decays.left[t]);
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        const V value = V::load(from + i, lanes), stepped = value * dt;
        value.store(x + t * width + i);
        stepped.store(stepped_x + t * width + i);
        (stepped * left).store(weighted_x + t * width + i);
        if constexpr (StateFactors<E>::kPairs) put_along(factors.weighted, factors.elements, t, i, stepped * left);
      });
    }
  }

  // ---- one chunk of one head, backward ----

  // dR' at the end of the row; without a chunk it is the gradient of the initial state as well.
  void leave(const Unit& unit, int64_t h) {
    const SsdRow& row = *unit.row;
    const int64_t head = unit.first_head + h, count = a.headdim * a.dstate;
    const A* from = a.grad_final == nullptr ? nullptr : state_of<A>(a, a.grad_final, unit.index, head);
    empty[h] = from == nullptr;
    if (row.begin < row.end && from != nullptr) {
      pack(from, a.dstate, a.headdim, a.dstate, gradient(h), keys.row);
      transpose(gradient(h), keys.row, a.headdim, a.dstate, turned_gradient(h), width);
    }
    if (a.grad_initial == nullptr || (row.begin < row.end && a.chunk[row.begin].entry == SsdEntry::initial)) return;
    A* to = state_of<A>(a, a.grad_initial, unit.index, head);
    if (row.begin < row.end || from == nullptr) return clear(to, count);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  void one_chunk(const Unit& unit, const SsdChunk& chunk, int64_t number) {
    if (chunk.padding) return pad(unit, chunk);
    keys.template load<T>(a, chunk, unit.row->batch, unit.group);
    factors.template load<T>(a, chunk, unit.row->batch, unit.group, keys.row);
    for (int64_t h = 0; h < unit.heads; ++h) {
      if (!chunk.leaves) empty[h] = true;
      upcoming.clear();
      if (h + 1 < unit.heads) {
        want_head(unit, chunk, h + 1, state(number) + (h + 1) * state_size);
      } else if (number > 0) {
        want_keys(unit, (&chunk)[-1]);
        want_head(unit, (&chunk)[-1], 0, state(number - 1));
      }
      one_head(unit, chunk, h, state(number) + h * state_size);
    }
    finish_keys(unit, chunk);
  }

  // `entering`: the state that enters, if any does.
  void one_head(const Unit& unit, const SsdChunk& chunk, int64_t h, const A* entering) {
    const int64_t head = unit.first_head + h, tokens = chunk.length, batch = unit.row->batch;
    const bool enters = chunk.entry != SsdEntry::zero, leaves = !empty[h];
    decays.compute(a, chunk, batch, head);
    load_x(chunk, batch, head);
    load_dy(chunk, batch, head);
    multiply_pairs(tokens, h == 0);
    input_gradient(tokens, h, leaves);
    sum_rows<A>(tokens, x_du, [&](int64_t t) { return row_product(x + t * width, du + t * width, a.headdim); });
    store_grad_x(chunk, batch, head, h);
    key_gradients(tokens, h, entering, enters, leaves);
    const double across = enters && leaves ? sum_product(entering, gradient(h)) * static_cast<double>(decays.all) : 0.0;
    step_gradient(chunk, batch, head, h, enters, leaves, across);
    if (enters) pass_gradient(unit, chunk, h, leaves);
    empty[h] = !enters;
  }

  // dY, times silu(z) where there is a gate, whose gradient is stored here.
  void load_dy(const SsdChunk& chunk, int64_t batch, int64_t head) {
    const T* from = head_of<T>(a.grad_y, batch, head);
    const T* gates = a.z.data == nullptr ? nullptr : head_of<T>(a.z, batch, head);
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; ++t) {
      const V grown(decays.grown[t]);
      const T* grad = from + token[t] * a.grad_y.token;
      const T* gate = gates == nullptr ? nullptr : gates + token[t] * a.z.token;
      const int64_t out = dense(a, batch, token[t], head, a.heads, a.headdim);
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        V value = V::load(grad + i, lanes);
        if (gate != nullptr) {
          const V z = V::load(gate + i, lanes), s = sigmoid(z);
          const V y = V::load(static_cast<const A*>(a.y) + out + i, lanes);
          (value * y * s * fma(z, V(A(1)) - s, V(A(1)))).store(static_cast<T*>(a.grad_z) + out + i, lanes);
          value = value * z * s;
        }
        value.store(dy + t * width + i);
        put_along(factors.grown, factors.elements, t, i, value * grown);
      });
    }
    if constexpr (StateFactors<E>::kPairs) pair_grown(chunk.length);
    transpose(dy, width, chunk.length, a.headdim, dy_turned, keys.pair_row);
  }

  void pair_grown(int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += 2) {
      const bool both = t + 1 < tokens;
      const V grown(decays.grown[t]), next_grown(both ? decays.grown[t + 1] : A(0));
      for (int64_t i = 0; i < width; i += V::size) {
        const V odd = both ? V::load(dy + (t + 1) * width + i) * next_grown : V();
        put(factors.grown_tokens, width, t, i, V::load(dy + t * width + i) * grown, odd);
      }
    }
  }

  // All that is made of pairs of tokens: weights, pair_sums, and w_k = sum_{j < k <= i} W_ij (B_j . C_i).
  void multiply_pairs(int64_t tokens, bool first) {
    const int64_t pairs = keys.pair_row, whole = padded<A>(tokens);
    Product<A> p{tokens, tokens, a.headdim, stepped_x, width, 1, dy_turned, pairs, products, pairs};
    p.upper = true;
    multiply_ahead(p);
    clear(crossing, whole), clear(lost, whole);
    w[0] = A(0);
    V part[V::size];
    for (int64_t j = 0; j < tokens; ++j) {
      const V next = pair_row(j, tokens, first);
      const int64_t k = j + 1;
      if (k == tokens) break;
      part[k % V::size] = next;
      if (k % V::size == V::size - 1 || k + 1 == tokens) sum_each(part).store(w + k / V::size * V::size);
    }
  }

  // Row j of the pairs.  Returns the lanes of w_{j + 1}.
  MMK_INLINE V pair_row(int64_t j, int64_t tokens, bool first) {
    const int64_t at = j * keys.pair_row, diagonal = j / V::size * V::size, next = (j + 1) / V::size * V::size;
    for (int64_t i = first_read<A>(j); i < diagonal; i += V::size) {
      V().store(weights + at + i);
      if (first) V().store(pair_sums + at + i);
    }
    V sum;
    for (int64_t i = diagonal; i < tokens; i += V::size) {
      V decay = decays.between(j, i);
      if (i == diagonal) decay = from_lane(j, i, decay);
      const V score = V::load(keys.scores + at + i), product = V::load(products + at + i) * decay;
      (score * decay).store(weights + at + i);
      (first ? product : product + V::load(pair_sums + at + i)).store(pair_sums + at + i);
      // Kahan's sum: a rounding error here would stay in w of all later tokens, and add up in the gradient of A.
      const V before = V::load(crossing + i), term = fma(product, score, -V::load(lost + i)), running = before + term;
      running.store(crossing + i);
      ((running - before) - term).store(lost + i);
      if (i > next) sum += running;
      if (i == next) sum += from_lane(j + 1, i, running);
    }
    return sum;
  }

  void input_gradient(int64_t tokens, int64_t h, bool leaves) {
    Product<A> inside{tokens, a.headdim, tokens, weights, keys.pair_row, 1, dy, width, du, width};
    inside.limit = Depth::from_row;
    if (leaves) {
      const E* gradient = factor_of(turned_gradient(h), a.dstate, width, factors.turned_gradient);
      multiply_ahead(Product<E>{tokens, a.headdim, depth_of<E>(a.dstate), factors.B, factors.key_elements, 1, gradient,
                                width, du, width});
      sum_rows<A>(tokens, q, [&](int64_t t) { return row_product(weighted_x + t * width, du + t * width, a.headdim); });
      inside.start = du, inside.scale = decays.left, inside.scale_row = 1;
    }
    multiply_ahead(inside);
  }

  void store_grad_x(const SsdChunk& chunk, int64_t batch, int64_t head, int64_t h) {
    const A* skips = static_cast<const A*>(a.D);
    const A* skip = skips != nullptr && a.D_per_channel ? skips + head * a.headdim : nullptr;
    const V same(skips != nullptr && !a.D_per_channel ? skips[head] : A(0));
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; ++t) {
      T* to = static_cast<T*>(a.grad_x) + dense(a, batch, token[t], head, a.heads, a.headdim);
      const V dt(decays.dt[t]);
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        V value = dt * V::load(du + t * width + i);
        if (skips != nullptr) {
          value = fma(skip == nullptr ? same : V::load(skip + i, lanes), V::load(dy + t * width + i), value);
        }
        value.store(to + i, lanes);
      });
    }
    if (a.grad_D == nullptr) return;
    for (int64_t i = 0; i < a.headdim; i += V::size) {
      V sum;
      for (int64_t t = 0; t < chunk.length; ++t) {
        sum = fma(V::load(x + t * width + i), V::load(dy + t * width + i), sum);
      }
      A lanes[V::size];
      sum.store(lanes);
      for (int64_t l = 0; l < V::size && i + l < a.headdim; ++l) grad_D[h * a.headdim + i + l] += lanes[l];
    }
  }

  // What the states contribute to dB and dC, and r.
  void key_gradients(int64_t tokens, int64_t h, const A* entering, bool enters, bool leaves) {
    const int64_t count = tokens * keys.row;
    if (leaves) {
      Product<E> p{tokens, a.dstate, depth_of<E>(a.headdim), factors.weighted, factors.elements, 1,
                   factor_of(gradient(h), a.headdim, keys.row, factors.gradient), keys.row, grad_B, keys.row};
      if (h > 0) p.start = grad_B;
      multiply_ahead(p);
    } else if (h == 0) {
      clear(grad_B, count);
    }
    if (!enters) {
      if (h == 0) clear(grad_C, count);
      return;
    }
    const E* state = factor_of(entering, a.headdim, keys.row, factors.entering);
    multiply_ahead(Product<E>{tokens, a.dstate, depth_of<E>(a.headdim), factors.grown, factors.elements, 1, state,
                              keys.row, from_state, keys.row});
    sum_rows<A>(tokens, r, [&](int64_t t) { return row_product(from_state + t * keys.row, keys.C + t * keys.row, a.dstate); });
    for (int64_t i = 0; i < count; i += V::size) {
      const V value = V::load(from_state + i);
      (h == 0 ? value : value + V::load(grad_C + i)).store(grad_C + i);
    }
  }

  // <R, dR'>.  Rows apart, then in double: it counts for every token of the chunk, and so would its error.
  double sum_product(const A* left, const A* right) {
    const auto product = [&](int64_t i) { return row_product(left + i * keys.row, right + i * keys.row, a.dstate); };
    sum_rows<A>(a.headdim, by_row, product);
    double sum = 0;
    for (int64_t i = 0; i < a.headdim; ++i) sum += static_cast<double>(by_row[i]);
    return sum;
  }

  // da, and with it the gradients of dt, A and dt_bias.
  void step_gradient(const SsdChunk& chunk, int64_t batch, int64_t head, int64_t h, bool enters, bool leaves, double across) {
    const double rate = static_cast<double>(static_cast<const A*>(a.A)[head]);
    double after = across;
    for (int64_t k = chunk.length - 1; k >= 0; --k) {
      if (enters) after += r[k];
      w[k] = static_cast<A>(after + w[k]);
    }
    double before = 0;
    for (int64_t k = 0; k < chunk.length; ++k) {
      const double fall = rate * static_cast<double>(decays.dt[k]), grad_fall = fall < -1024.0 ? 0.0 : w[k] + before;
      if (leaves) before += q[k];
      grad_A[h] += grad_fall * static_cast<double>(decays.dt[k]);
      w[k] = static_cast<A>(static_cast<double>(x_du[k]) + rate * grad_fall);
    }
    for (int64_t k = 0; k < chunk.length; k += V::size) through_step(k).store(w + k);
    const Walk token(a, chunk);
    for (int64_t k = 0; k < chunk.length; ++k) {
      static_cast<A*>(a.grad_dt)[dense(a, batch, token[k], head, a.heads, 1)] = w[k];
      grad_bias[h] += static_cast<double>(w[k]);
    }
  }

  // The gradients w of step sizes from token k on, taken back through clamp and softplus.
  MMK_INLINE V through_step(int64_t k) const {
    const V pre = V::load(decays.pre + k), grad = V::load(w + k), one(A(1)), none;
    const V step = a.softplus ? softplus(pre) : pre;
    const V slope = a.softplus ? select<A>(pre > V(A(20)), one, sigmoid(pre)) : one;
    const V above = select<A>(step < V(A(a.dt_low)), none, grad * slope);
    return select<A>(step > V(A(a.dt_high)), none, above);
  }

  // dR' of the chunk before, or the gradient of the initial state.
  void pass_gradient(const Unit& unit, const SsdChunk& chunk, int64_t h, bool leaves) {
    Product<E> p{a.headdim, a.dstate, depth_of<E>(chunk.length), factors.grown_tokens, 1, width, factors.C_tokens,
                 keys.row, gradient(h), keys.row};
    if (leaves) p.start = gradient(h), p.scale = &decays.all;
    multiply_ahead(p);
    if (chunk.entry == SsdEntry::carried) {
      transpose(gradient(h), keys.row, a.headdim, a.dstate, turned_gradient(h), width);
    } else if (a.grad_initial != nullptr) {
      A* to = state_of<A>(a, a.grad_initial, unit.index, unit.first_head + h);
      for (int64_t i = 0; i < a.headdim; ++i) {
        for_lanes<V>(a.dstate, [&](int64_t n, auto lanes) {
          V::load(gradient(h) + i * keys.row + n).store(to + i * a.dstate + n, lanes);
        });
      }
    }
  }

  // ---- outputs shared by heads ----

  void finish_keys(const Unit& unit, const SsdChunk& chunk) {
    const int64_t tokens = chunk.length, pairs = keys.pair_row;
    Product<A> to_B{tokens, a.dstate, tokens, pair_sums, pairs, 1, keys.C, keys.row, grad_B, keys.row};
    to_B.limit = Depth::from_row, to_B.start = grad_B;
    multiply_ahead(to_B);
    Product<A> to_C{tokens, a.dstate, tokens, pair_sums, 1, pairs, keys.B, keys.row, grad_C, keys.row};
    to_C.limit = Depth::to_row, to_C.start = grad_C;
    multiply_ahead(to_C);
    if (a.head_blocks == 1) {
      store_keys<T>(unit, chunk, grad_B, a.grad_B), store_keys<T>(unit, chunk, grad_C, a.grad_C);
    } else {
      store_keys<A>(unit, chunk, grad_B, a.grad_B), store_keys<A>(unit, chunk, grad_C, a.grad_C);
    }
  }

  // from null: zeros.
  template <class Out>
  void store_keys(const Unit& unit, const SsdChunk& chunk, const A* from, void* out) {
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; ++t) {
      Out* to = static_cast<Out*>(out) + unit.block * a.block_stride +
                dense(a, unit.row->batch, token[t], unit.group, a.groups, a.dstate);
      for_lanes<V>(a.dstate, [&](int64_t i, auto lanes) {
        (from == nullptr ? V() : V::load(from + t * keys.row + i)).store(to + i, lanes);
      });
    }
  }

  void pad(const Unit& unit, const SsdChunk& chunk) {
    for (int64_t h = 0; h < unit.heads; ++h) {
      empty[h] = true;
      for (int64_t t = 0; t < chunk.length; ++t) {
        const int64_t token = Walk(a, chunk)[t], head = unit.first_head + h;
        const int64_t at = dense(a, unit.row->batch, token, head, a.heads, a.headdim);
        clear(static_cast<T*>(a.grad_x) + at, a.headdim);
        if (a.z.data != nullptr) clear(static_cast<T*>(a.grad_z) + at, a.headdim);
        static_cast<A*>(a.grad_dt)[dense(a, unit.row->batch, token, head, a.heads, 1)] = A(0);
      }
    }
    void* const outputs[] = {a.grad_B, a.grad_C};
    for (void* out : outputs) {
      a.head_blocks == 1 ? store_keys<T>(unit, chunk, nullptr, out) : store_keys<A>(unit, chunk, nullptr, out);
    }
  }

  void store_sums(const Unit& unit, int64_t h) {
    const int64_t at = unit.index * a.heads + unit.first_head + h;
    a.grad_A[at] = grad_A[h];
    a.grad_dt_bias[at] = grad_bias[h];
    if (a.grad_D == nullptr) return;
    for (int64_t i = 0; i < a.headdim; ++i) a.grad_D[at * a.headdim + i] = grad_D[h * a.headdim + i];
  }
};

template <class T>
void backward(const SsdBackward& a) {
  parallel_for(unit_count(a), unit_grain(a), [&](int64_t begin, int64_t end) {
    Arena measure{nullptr};
    Backward<T>(measure, a);
    Arena arena{static_cast<char*>(thread_scratch(measure.used))};
    Backward<T> work(arena, a);
    for (int64_t i = begin; i < end; ++i) work.run(Unit(a, i));
  });
}

template <class T>
void sum_blocks(const SsdBlockSum& a) {
  using A = Arithmetic<T>;
  const A* from = static_cast<const A*>(a.from);
  parallel_for(a.count, grain_of(a.blocks), [&](int64_t begin, int64_t end) {
    for_lanes<Vec<A>>(end - begin, [&](int64_t i, auto lanes) {
      Vec<A> sum = Vec<A>::load(from + begin + i, lanes);
      for (int64_t block = 1; block < a.blocks; ++block) sum += Vec<A>::load(from + block * a.count + begin + i, lanes);
      sum.store(static_cast<T*>(a.to) + begin + i, lanes);
    });
  });
}

}  // namespace

void ssd_bwd(const SsdBackward& arguments) {
  with_storage(arguments.storage, [&](auto element) { backward<decltype(element)>(arguments); });
}

void ssd_sum_blocks(const SsdBlockSum& arguments) {
  with_storage(arguments.storage, [&](auto element) { sum_blocks<decltype(element)>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
