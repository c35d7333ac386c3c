// Forward of the state-space scan.  The formulas are in ssd_chunk.h.
//
// A task owns some heads of one group of one row and walks its chunks in scan order.  The states stay in cache all the
// way, as [dstate][headdim]; x is read once, y written once, and C B^T is shared by the task's heads.
#include "cpu/conv_rows.h"
#include "cpu/ssd_chunk.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// What is read next after x of a chunk and head: `count` tokens, `tokens` further on in the scan and `heads` heads up.
struct Ahead {
  int64_t tokens, count, heads;
};

template <class T>
struct Forward {
  using A = Arithmetic<T>;
  using V = Vec<A>;

  const SsdForward& a;
  int64_t width;  // elements of a padded row of x
  Keys<A> keys;
  Decays<A> decays;
  A *x, *weighted_x, *weights, *y, *states;
  bool* empty;  // of each head: its state is zero
  Ahead ahead;
  const T** taken;  // the rows that a convolution reads
  T* nothing;       // and what it reads before the first token

  Forward(Arena& arena, const SsdForward& call)
      : a(call), width(padded<A>(a.headdim)), keys(arena, a), decays(arena, keys.pair_row),
        x(arena.take<A>(a.chunk_tokens * width)), weighted_x(arena.take<A>(a.chunk_tokens * width)),
        weights(arena.take<A>(a.chunk_tokens * keys.pair_row)), y(arena.take<A>(a.chunk_tokens * width)),
        states(arena.take<A>(most_heads() * a.dstate * width)), empty(arena.take<bool>(most_heads())),
        taken(arena.take<const T*>(a.conv.width + kRowsAtOnce)), nothing(arena.take<T>(a.headdim)) {}

  int64_t most_heads() const { return (a.heads / a.groups + a.head_blocks - 1) / a.head_blocks; }
  A* state(int64_t h) const { return states + h * a.dstate * width; }

  void run(const Unit& unit) {
    const SsdRow& row = *unit.row;
    if (a.conv.width > 0) clear(nothing, a.headdim);
    for (int64_t h = 0; h < unit.heads; ++h) enter(unit, h, row.begin == row.end || a.chunk[row.begin].entry == SsdEntry::initial);
    for (int64_t c = row.begin; c < row.end; ++c) {
      const SsdChunk& chunk = a.chunk[c];
      if (chunk.padding) {
        for (int64_t h = 0; h < unit.heads; ++h) pad(chunk, row.batch, unit.first_head + h), empty[h] = true;
        continue;
      }
      const bool leaves = chunk.leaves && (c + 1 < row.end || a.final != nullptr);
      keys.template load<T>(a, chunk, row.batch, unit.group);
      for (int64_t h = 0; h < unit.heads; ++h) {
        if (chunk.entry == SsdEntry::zero) empty[h] = true;
        const bool last = h + 1 == unit.heads;
        const int64_t follows = c + 1 < row.end && !a.chunk[c + 1].padding ? a.chunk[c + 1].length : 0;
        ahead = last ? Ahead{chunk.length, follows, 1 - unit.heads} : Ahead{0, chunk.length, 1};
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

  void one_head(const SsdChunk& chunk, int64_t batch, int64_t head, A* state, bool nothing_enters, bool leaves) {
    const int64_t tokens = chunk.length, pairs = keys.pair_row;
    decays.compute(a, chunk, batch, head);
    load_x(chunk, batch, head, leaves);
    fill_weights(tokens, a.D == nullptr || a.D_per_channel ? A(0) : static_cast<const A*>(a.D)[head]);
    if (!nothing_enters) multiply(Product<A>{tokens, a.headdim, a.dstate, keys.C, keys.row, 1, state, width, y, width});
    Product<A> inside{tokens, a.headdim, tokens, weights, 1, pairs, x, width, y, width};
    inside.limit = Depth::to_row;
    if (!nothing_enters) inside.start = y, inside.scale = decays.grown, inside.scale_row = 1;
    multiply(inside);
    a.y_arithmetic ? store_y<A>(chunk, batch, head) : store_y<T>(chunk, batch, head);
    if (!leaves) return;
    Product<A> update{a.dstate, a.headdim, tokens, keys.B, 1, keys.row, weighted_x, width, state, width};
    if (!nothing_enters) update.start = state, update.scale = &decays.all;
    multiply(update);
  }

  // x, and e^{s_T - s_j} dt_j x_j where the leaving state needs it.
  void load_x(const SsdChunk& chunk, int64_t batch, int64_t head, bool leaves) {
    const T* from = head_of<T>(a.x, batch, head);
    const Walk token(a, chunk);
    if (a.conv.width > 0) return convolve_x(chunk, batch, from, head, leaves);
    if (!leaves) return pack(a.x, from, token, chunk.length, a.headdim, x, width);
    for (int64_t t = 0; t < chunk.length; ++t) {
      const V weight(decays.left[t] * decays.dt[t]);
      const T* row = from + token[t] * a.x.token;
      fetch_next(from, token, t, batch, head), fetch_output(batch, token[t], head);
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        const V value = V::load(row + i, lanes);
        value.store(x + t * width + i);
        (value * weight).store(weighted_x + t * width + i);
      });
    }
  }

  // The next head's part of a token's row, or the next chunk's: too short and too far from the last for the processor to
  // guess.  Rows of another chunk also lie in other pages.
  MMK_INLINE void fetch_next(const T* from, const Walk& token, int64_t t, int64_t batch, int64_t head) const {
    if (t >= ahead.count) return;
    const int64_t next = token[t + ahead.tokens];
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    const T* row = from + next * a.x.token + ahead.heads * a.x.head;
    for (int64_t i = 0; i < a.headdim; i += line) __builtin_prefetch(row + i);
    if (ahead.tokens > 0) __builtin_prefetch(head_of<A>(a.dt, batch, head + ahead.heads) + next * a.dt.token);
  }

  // The rows of y that this head will write; long enough before it does.
  MMK_INLINE void fetch_output(int64_t batch, int64_t token, int64_t head) const {
    const int64_t bytes = a.y_arithmetic ? sizeof(A) : sizeof(T);
    const char* row = static_cast<const char*>(a.y) + dense(a, batch, token, head, a.heads, a.headdim) * bytes;
    for (int64_t i = 0; i < a.headdim * bytes; i += 64) __builtin_prefetch(row + i, 1, 2);
  }

  // The same for x that a convolution makes: a few rows at a time, which stay in registers and L1.
  void convolve_x(const SsdChunk& chunk, int64_t batch, const T* from, int64_t head, bool leaves) {
    const SsdConvolution& c = a.conv;
    const int64_t at = head * a.headdim;
    const Taps<A> taps{static_cast<const A*>(c.taps) + at, c.channels, c.width};
    const A* bias = c.bias == nullptr ? nullptr : static_cast<const A*>(c.bias) + at;
    const Walk token(a, chunk);
    const auto rows = [&](int64_t t, auto count) {
      constexpr int R = decltype(count)::value;
      for (int64_t k = 0; k < R + c.width - 1; ++k) {
        const int64_t position = chunk.token + t + k - (c.width - 1);
        taken[k] = position < 0 ? nothing : from + a.order[position] * a.x.token;
      }
      A* out[R];
      for (int r = 0; r < R; ++r) {
        out[r] = x + (t + r) * width;
        fetch_next(from, token, t + r, batch, head), fetch_output(batch, token[t + r], head);
      }
      convolve<R>(taken, taps, bias, c.silu, out, a.headdim);
    };
    int64_t t = 0;
    for (; t + kRowsAtOnce <= chunk.length; t += kRowsAtOnce) rows(t, Constant<kRowsAtOnce>{});
    for (; t < chunk.length; ++t) rows(t, Constant<1>{});
    if (!leaves) return;
    for (t = 0; t < chunk.length; ++t) {
      const V weight(decays.left[t] * decays.dt[t]);
      for (int64_t i = 0; i < a.headdim; i += V::size) (V::load(x + t * width + i) * weight).store(weighted_x + t * width + i);
    }
  }

  // weights[j][i] = (B_j . C_i) e^{s_i - s_j} dt_j, and D on top of the diagonal.
  void fill_weights(int64_t tokens, A skip) {
    const int64_t pairs = keys.pair_row;
    decays.factor(tokens, pairs);
    for (int64_t j = 0; j < tokens; ++j) {
      A* to = weights + j * pairs;
      const A *scores = keys.scores + j * pairs, *after = decays.after + j / V::size * pairs;
      const int64_t diagonal = j / V::size * V::size;
      for (int64_t i = first_read<A>(j); i < diagonal; i += V::size) V().store(to + i);
      const V dt(decays.dt[j]), until(decays.until[j]);
      from_lane(j, diagonal, V::load(scores + diagonal) * decays.between(j, diagonal) * dt).store(to + diagonal);
      for (int64_t i = diagonal + V::size; i < tokens; i += V::size) {
        (V::load(scores + i) * (V::load(after + i) * until)).store(to + i);
      }
      to[j] += skip;
    }
  }

  template <class Y>
  void store_y(const SsdChunk& chunk, int64_t batch, int64_t head) {
    const A* skip = a.D_per_channel ? static_cast<const A*>(a.D) + head * a.headdim : nullptr;
    const T* gates = a.z.data == nullptr ? nullptr : head_of<T>(a.z, batch, head);
    const Walk token(a, chunk);
    for (int64_t t = 0; t < chunk.length; ++t) {
      Y* to = static_cast<Y*>(a.y) + dense(a, batch, token[t], head, a.heads, a.headdim);
      const T* gate = gates == nullptr ? nullptr : gates + token[t] * a.z.token;
      for_lanes<V>(a.headdim, [&](int64_t i, auto lanes) {
        V value = V::load(y + t * width + i);
        if (skip != nullptr) value = fma(V::load(skip + i, lanes), V::load(x + t * width + i), value);
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
