// Forward of the state-space scan.  The formulas are in ssd_chunk.h.
//
// A task owns some heads of one group of one row and walks its chunks in scan order.  The states stay in cache all the
// way, as [dstate][headdim]; x is read once, y written once, and C B^T is shared by the task's heads.
#include "cpu/conv_rows.h"
#include "cpu/ssd_chunk.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// Rows of x: of the tensor, or what a convolution made of them.
template <class S>
struct Rows {
  const S* first;
  Walk token;
  int64_t step;
  MMK_INLINE const S* operator[](int64_t t) const { return first + token[t] * step; }
};

template <class T>
struct Forward {
  using A = Arithmetic<T>;
  using E = Element<T>;
  using V = Vec<A>;

  const SsdForward& a;
  int64_t width;  // numbers in a padded row of x
  Keys<E> keys;
  Decays<A> decays;
  E *x, *weighted_x, *weights;  // the depth over tokens
  A* y;  // rows of one register tile
  A* states;
  E* entering;  // a state as pairs
  bool* empty;  // of each head: its state is zero
  Upcoming upcoming;
  A* convolved;    // x
  const T** taken;  // the rows that a convolution reads
  T* nothing;       // and what it reads before the first token

  Forward(Arena& arena, const SsdForward& call)
      : a(call), width(padded<A>(a.headdim)), keys(arena, a), decays(arena, keys.pair_row), x(take_factor(arena, width)),
        weighted_x(take_factor(arena, width)), weights(take_factor(arena, keys.pair_row)),
        y(arena.take<A>(kTileRows * width)), states(arena.take<A>(most_heads() * a.dstate * width)),
        entering(Factor<E>::depth == 1 ? nullptr : arena.take<E>(depth_of<E>(a.dstate) * width)),
        empty(arena.take<bool>(most_heads())), upcoming(arena, 6 * a.chunk_tokens),
        convolved(a.conv.width > 0 ? arena.take<A>(a.chunk_tokens * width) : nullptr),
        taken(arena.take<const T*>(a.conv.width + kRowsAtOnce)), nothing(arena.take<T>(a.headdim)) {}

  E* take_factor(Arena& arena, int64_t row) const {
    return arena.take<E>(even(a.chunk_tokens) / Factor<E>::depth * row);
  }
  int64_t most_heads() const { return (a.heads / a.groups + a.head_blocks - 1) / a.head_blocks; }
  A* state(int64_t h) const { return states + h * a.dstate * width; }

  void run(const Unit& unit) {
    const SsdRow& row = *unit.row;
    if (a.conv.width > 0) clear(nothing, a.headdim);
    const bool initial = row.begin == row.end || a.chunk[row.begin].entry == SsdEntry::initial;
    for (int64_t h = 0; h < unit.heads; ++h) enter(unit, h, initial);
    for (int64_t c = row.begin; c < row.end; ++c) {
      const SsdChunk& chunk = a.chunk[c];
      if (chunk.padding) {
        for (int64_t h = 0; h < unit.heads; ++h) pad(chunk, row.batch, unit.first_head + h), empty[h] = true;
        continue;
      }
      const bool leaves = chunk.leaves && (c + 1 < row.end || a.final != nullptr);
      keys.template load<T>(a, chunk, row.batch, unit.group);
      const SsdChunk* next = c + 1 < row.end && !a.chunk[c + 1].padding ? &a.chunk[c + 1] : nullptr;
      for (int64_t h = 0; h < unit.heads; ++h) {
        if (chunk.entry == SsdEntry::zero) empty[h] = true;
        const bool last = h + 1 == unit.heads;
        upcoming.clear();
        if (!last) look_ahead(unit, chunk, unit.first_head + h + 1, false);
        if (last && next != nullptr) look_ahead(unit, *next, unit.first_head, true);
        one_head(chunk, row.batch, unit.first_head + h, state(h), empty[h], leaves);
        empty[h] = !leaves;
      }
    }
    if (a.final == nullptr) return;
    for (int64_t h = 0; h < unit.heads; ++h) {
      A* final = state_of<A>(a, a.final, unit.index, unit.first_head + h);
      if (empty[h]) {
        clear(final, a.headdim * a.dstate);
      } else {
        transpose_dense(state(h), width, a.dstate, a.headdim, final, a.dstate);
      }
    }
  }

  void enter(const Unit& unit, int64_t h, bool wanted) {
    empty[h] = a.initial == nullptr || !wanted;
    if (empty[h]) return;
    const A* initial = state_of<A>(a, a.initial, unit.index, unit.first_head + h);
    transpose(initial, a.dstate, a.headdim, a.dstate, state(h), width);
  }

  // What the next head or chunk reads, and the rows of y it writes: too short and too far apart for the processor to
  // guess, and rows of another chunk also lie in other pages.
  void look_ahead(const Unit& unit, const SsdChunk& next, int64_t head, bool other_chunk) {
    const int64_t batch = unit.row->batch, of_y = a.y_arithmetic ? sizeof(A) : sizeof(T), of_x = sizeof(T);
    const Walk token(a, next);
    if (other_chunk) {
      const T *of_B = head_of<T>(a.B, batch, unit.group), *of_C = head_of<T>(a.C, batch, unit.group);
      const A* steps = head_of<A>(a.dt, batch, head);
      for (int64_t t = 0; t < next.length; ++t) {
        upcoming.read(of_B + token[t] * a.B.token, a.dstate * of_x);
        upcoming.read(of_C + token[t] * a.C.token, a.dstate * of_x);
        upcoming.read(steps + token[t] * a.dt.token, sizeof(A));
      }
    }
    const T* from = head_of<T>(a.x, batch, head);
    for (int64_t t = 0; t < next.length; ++t) upcoming.read(from + token[t] * a.x.token, a.headdim * of_x);
    const T* gates = a.z.data == nullptr ? nullptr : head_of<T>(a.z, batch, head);
    for (int64_t t = 0; t < next.length && gates != nullptr; ++t) {
      upcoming.read(gates + token[t] * a.z.token, a.headdim * of_x);
    }
    const char* out = static_cast<const char*>(a.y);
    for (int64_t t = 0; t < next.length; ++t) {
      upcoming.write(out + dense(a, batch, token[t], head, a.heads, a.headdim) * of_y, a.headdim * of_y);
    }
  }

  void one_head(const SsdChunk& chunk, int64_t batch, int64_t head, A* state, bool nothing_enters, bool leaves) {
    decays.compute(a, chunk, batch, head);
    const T* from = head_of<T>(a.x, batch, head);
    if (a.conv.width == 0) {
      one_head(chunk, batch, head, state, nothing_enters, leaves, Rows<T>{from, Walk(a, chunk), a.x.token});
    } else {
      convolve_x(chunk, from, head);
      one_head(chunk, batch, head, state, nothing_enters, leaves, Rows<A>{convolved, Walk(), width});
    }
  }

  template <class S>
  void one_head(const SsdChunk& chunk, int64_t batch, int64_t head, A* state, bool nothing_enters, bool leaves,
                const Rows<S>& rows) {
    const int64_t tokens = chunk.length;
    load_x(tokens, rows, leaves);
    fill_weights(tokens);
    const E* entered = nothing_enters ? nullptr : factor_of(state, a.dstate, width, entering);
    // A few rows at a time: what they wait for, to be read or written, comes while the next ones are multiplied.
    for (int64_t row = 0; row < tokens; row += kTileRows) {
      const int64_t count = tokens - row < kTileRows ? tokens - row : kTileRows;
      Product<E> inside{count, a.headdim, depth_of<E>(row + count), weights + row, 1, keys.pair_row, x, width, y, width};
      if (entered != nullptr) {
        const E* C = keys.C + row * keys.elements;
        multiply(Product<E>{count, a.headdim, depth_of<E>(a.dstate), C, keys.elements, 1, entered, width, y, width});
        inside.start = y, inside.scale = decays.grown + row, inside.scale_row = 1;
      }
      multiply(inside);
      a.y_arithmetic ? store_y<A>(chunk, batch, head, rows, row, count) : store_y<T>(chunk, batch, head, rows, row, count);
      upcoming.fetch_some();
    }
    if (!leaves) return;
    const int64_t depth = depth_of<E>(tokens);
    Product<E> update{a.dstate, a.headdim, depth, keys.B_tokens, 1, keys.row, weighted_x, width, state, width};
    if (!nothing_enters) update.start = state, update.scale = &decays.all;
    multiply(update, [this] { upcoming.fetch_some(); });
  }

  // x, and e^{s_T - s_j} dt_j x_j where the leaving state needs it.
  template <class S>
  void load_x(int64_t tokens, const Rows<S>& rows, bool leaves) {
    for (int64_t t = 0; t < tokens; t += 2) {
      const bool both = t + 1 < tokens;
      const S *first = rows[t], *second = both ? rows[t + 1] : first;
      const V weight(decays.left[t] * decays.dt[t]), next_weight(both ? decays.left[t + 1] * decays.dt[t + 1] : A(0));
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        const V value = V::load(first + i, lanes), next = both ? V::load(second + i, lanes) : V();
        put_stored<S>(x, width, t, i, value, next);
        if (leaves) put(weighted_x, width, t, i, value * weight, next * next_weight);
      });
    }
  }

  // x that a convolution makes: a few rows at a time, which stay in registers and L1.
  void convolve_x(const SsdChunk& chunk, const T* from, int64_t head) {
    const SsdConvolution& c = a.conv;
    const int64_t at = head * a.headdim;
    const Taps<A> taps{static_cast<const A*>(c.taps) + at, c.channels, c.width};
    const A* bias = c.bias == nullptr ? nullptr : static_cast<const A*>(c.bias) + at;
    const auto convolve_rows = [&](int64_t t, auto count) {
      constexpr int R = decltype(count)::value;
      for (int64_t k = 0; k < R + c.width - 1; ++k) {
        const int64_t position = chunk.token + t + k - (c.width - 1);
        taken[k] = position < 0 ? nothing : from + a.order[position] * a.x.token;
      }
      A* out[R];
      for (int r = 0; r < R; ++r) out[r] = convolved + (t + r) * width;
      convolve<R>(taken, taps, bias, c.silu, out, a.headdim);
    };
    int64_t t = 0;
    for (; t + kRowsAtOnce <= chunk.length; t += kRowsAtOnce) convolve_rows(t, Constant<kRowsAtOnce>{});
    for (; t < chunk.length; ++t) convolve_rows(t, Constant<1>{});
  }

  // weights[j][i] = (B_j . C_i) e^{s_i - s_j} dt_j for j <= i.
  void fill_weights(int64_t tokens) {
    const int64_t pairs = keys.pair_row;
    decays.factor(tokens, pairs);
    for (int64_t j = 0; j < tokens; j += 2) {
      const bool both = j + 1 < tokens;
      const A *scores = keys.scores + j * pairs, *next_scores = scores + pairs;
      const A* after = decays.after + j / V::size * pairs;
      const int64_t diagonal = j / V::size * V::size;
      for (int64_t i = first_read<A>(j); i < diagonal; i += V::size) put(weights, pairs, j, i, V(), V());
      const auto at_diagonal = [&](int64_t row, const A* score) {
        return from_lane(row, diagonal, V::load(score + diagonal) * decays.between(row, diagonal) * V(decays.dt[row]));
      };
      put(weights, pairs, j, diagonal, at_diagonal(j, scores), both ? at_diagonal(j + 1, next_scores) : V());
      const V until(decays.until[j]), next_until(both ? decays.until[j + 1] : A(0));
      for (int64_t i = diagonal + V::size; i < tokens; i += V::size) {
        const V rest = V::load(after + i);
        const V next = both ? V::load(next_scores + i) * (rest * next_until) : V();
        put(weights, pairs, j, i, V::load(scores + i) * (rest * until), next);
      }
    }
  }

  // Tokens first .. first + count, with D x and through the gate.
  template <class Y, class S>
  void store_y(const SsdChunk& chunk, int64_t batch, int64_t head, const Rows<S>& rows, int64_t first, int64_t count) {
    const A* skips = static_cast<const A*>(a.D);
    const A* skip = skips != nullptr && a.D_per_channel ? skips + head * a.headdim : nullptr;
    const V same(skips != nullptr && !a.D_per_channel ? skips[head] : A(0));
    const T* gates = a.z.data == nullptr ? nullptr : head_of<T>(a.z, batch, head);
    const Walk token(a, chunk);
    for (int64_t t = first; t < first + count; ++t) {
      Y* to = static_cast<Y*>(a.y) + dense(a, batch, token[t], head, a.heads, a.headdim);
      const T* gate = gates == nullptr ? nullptr : gates + token[t] * a.z.token;
      const S* from = rows[t];
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        V value = V::load(y + (t - first) * width + i);
        const V by = skip == nullptr ? same : V::load(skip + i, lanes);
        if (skips != nullptr) value = fma(by, V::load(from + i, lanes), value);
        if (gate != nullptr) value = value * silu(V::load(gate + i, lanes));
        value.store(to + i, lanes);
      });
    }
  }

  void pad(const SsdChunk& chunk, int64_t batch, int64_t head) {
    for (int64_t t = 0; t < chunk.length; ++t) {
      const int64_t at = dense(a, batch, Walk(a, chunk)[t], head, a.heads, a.headdim);
      a.y_arithmetic ? clear(static_cast<A*>(a.y) + at, a.headdim) : clear(static_cast<T*>(a.y) + at, a.headdim);
    }
  }
};

template <class T>
void forward(const SsdForward& a) {
  parallel_for(unit_count(a), unit_grain(a), [&](int64_t begin, int64_t end) {
    Arena measure{nullptr};
    Forward<T>(measure, a);
    Arena arena{static_cast<char*>(thread_scratch(measure.used))};
    Forward<T> work(arena, a);
    for (int64_t i = begin; i < end; ++i) work.run(Unit(a, i));
  });
}

}  // namespace

void ssd_fwd(const SsdForward& arguments) {
  with_storage(arguments.storage, [&](auto element) { forward<decltype(element)>(arguments); });
}

}  // namespace mmkernels::MMK_ISA_NS
