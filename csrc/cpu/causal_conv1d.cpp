// out_p = act(bias + sum over k of tap_k x_(p - width + 1 + k)) for the positions p of a run, and its gradients; the
// definition of runs and positions is in causal_conv1d.h, the derivation in the op's README.
//
// Channels are dense, so everything is a multiply-add of rows: a task takes a piece of a run and some channels, and
// computes four outputs from width + 3 rows at a time, which stay in L1.  Rows before the run are pointers to rows of
// zeros or states, so no case needs code of its own, and no tap ever looks at a token of another run or at padding.
#include "cpu/causal_conv1d.h"

#include "common/parallel.h"
#include "cpu/conv_rows.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// Equal slices of the channels, at most `most` each and whole vectors but for the last.
struct Slices {
  int64_t dim, count, size;
  Slices(int64_t dim_, int64_t most) : dim(dim_), count((dim_ + most - 1) / most), size(0) {
    if (count > 0) size = ((dim + count - 1) / count + 63) / 64 * 64;
    if (size > 0) count = (dim + size - 1) / size;
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return (i + 1) * size < dim ? size : dim - i * size; }
};

// Tokens of a piece on average, at least one.
inline int64_t mean_tokens(const CausalConv1d& a) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < a.piece_count; ++i) tokens += a.pieces[i].end - a.pieces[i].begin;
  return tokens < a.piece_count ? 1 : tokens / (a.piece_count < 1 ? 1 : a.piece_count);
}

// One piece and one slice of the channels.
template <class T, class A>
struct Task {
  const CausalConv1d& a;
  const ConvPiece& piece;
  int64_t at, n;        // first channel, channels
  const T* before;      // (width - 1) rows of n: the positions -(width - 1) ... -1
  const T* zeros;

  int64_t token(int64_t position) const {
    return a.order == nullptr ? piece.origin + a.step * position : a.order[position];
  }
  const T* input(int64_t position) const {
    if (position < 0) return piece.initial < 0 ? zeros : before + (position + a.width - 1) * n;
    return static_cast<const T*>(a.x.data) + piece.row * a.x.row + token(position) * a.x.token + at;
  }
  T* output(const TokensOut& tokens, int64_t position) const {
    return static_cast<T*>(tokens.data) + piece.row * tokens.row + token(position) * tokens.token + at;
  }
  const T* read(const TokensIn& tokens, int64_t position) const {
    return static_cast<const T*>(tokens.data) + piece.row * tokens.row + token(position) * tokens.token + at;
  }
  // Copies the states to `rows`, which is `before`, if this piece reads any.
  void load_states(T* rows) const {
    if (piece.initial < 0 || piece.begin >= a.width - 1) return;
    gather_rows(static_cast<const T*>(a.initial.data) + piece.initial * a.initial.row + at * a.initial.channel,
                a.initial.channel, a.initial.time, a.width - 1, n, rows, n);
  }
  Taps<A> taps() const { return {static_cast<const A*>(a.taps) + at, a.dim, a.width}; }
  const A* bias() const { return a.bias == nullptr ? nullptr : static_cast<const A*>(a.bias) + at; }
};

template <class T>
MMK_INLINE void clear(T* row, int64_t n) {
  __builtin_memset(static_cast<void*>(row), 0, sizeof(T) * n);
}

// ---- forward ----------------------------------------------------------------------------------------------------------

template <class T, class A>
void write_final(const CausalConv1dForward& a, const Task<T, A>& task, T* scratch) {
  const ConvPiece& piece = task.piece;
  if (a.final.data == nullptr || piece.final < 0 || piece.end != piece.length) return;
  const int64_t history = a.width - 1;
  for (int64_t j = 0; j < history; ++j) {
    T* row = scratch + j * task.n;
    if (piece.padding) {
      clear(row, task.n);
    } else {
      __builtin_memcpy(static_cast<void*>(row), task.input(piece.length - history + j), sizeof(T) * task.n);
    }
  }
  T* to = static_cast<T*>(a.final.data) + piece.final * a.final.row + task.at * a.final.channel;
  scatter_rows(scratch, task.n, a.final.channel, a.final.time, history, task.n, to);
}

template <class T, int R, class A>
MMK_INLINE void forward_rows(const CausalConv1dForward& a, const Task<T, A>& task, int64_t position, const T** rows) {
  for (int64_t k = 0; k < R + a.width - 1; ++k) rows[k] = task.input(position + k - (a.width - 1));
  T* out[R];
  for (int r = 0; r < R; ++r) out[r] = task.output(a.y, position + r);
  convolve<R>(rows, task.taps(), task.bias(), a.silu, out, task.n);
}

template <class T>
void forward(const CausalConv1dForward& a) {
  using A = Arithmetic<T>;
  const Slices slices(a.dim, 2048);
  const int64_t history = a.width - 1;
  const int64_t pointers = sizeof(void*) * (a.width + kRowsAtOnce);
  const int64_t bytes = Carver::lines(pointers) + 3 * 64 + sizeof(T) * slices.size * (2 * history + 1);
  parallel_for(a.piece_count * slices.count, grain_of(slices.size * mean_tokens(a)), [&](int64_t first, int64_t last) {
    Carver scratch{static_cast<char*>(thread_scratch(bytes))};
    const T** rows = scratch.take<const T*>(a.width + kRowsAtOnce);
    T* before = scratch.take<T>(slices.size * history);
    T* zeros = scratch.take<T>(slices.size);
    T* final = scratch.take<T>(slices.size * history);
    clear(zeros, slices.size);
    for (int64_t i = first; i < last; ++i) {
      const ConvPiece& piece = a.pieces[i / slices.count];
      const int64_t slice = i % slices.count;
      const Task<T, A> task{a, piece, slices.begin(slice), slices.length(slice), before, zeros};
      int64_t position = piece.begin;
      if (piece.padding) {
        for (; position < piece.end; ++position) clear(task.output(a.y, position), task.n);
      } else {
        task.load_states(before);
      }
      for (; position + kRowsAtOnce <= piece.end; position += kRowsAtOnce) {
        forward_rows<T, kRowsAtOnce>(a, task, position, rows);
      }
      for (; position < piece.end; ++position) forward_rows<T, 1>(a, task, position, rows);
      write_final(a, task, final);
    }
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// Of R neighbouring outputs: the gradient before the activation, kept in `kept`, and added to those of taps and bias.
template <int R, int W, class T, class A>
void output_gradients_width(const T* const* rows, const Taps<A>& taps, const A* bias, bool with_silu,
                            const T* const* grads, A* kept, A* sums, int64_t sums_stride, int64_t n) {
  using V = Vec<A>;
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    V grad[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) grad[r] = V::load(grads[r] + i, lanes);
    if (with_silu) {
      const V start = bias == nullptr ? V() : V::load(bias + i, lanes);
      V out[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) out[r] = start;
      add_taps<R, W>(out, rows, taps, i, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V s = sigmoid(out[r]);
        grad[r] = grad[r] * s * fma(out[r], V(A(1)) - s, V(A(1)));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) grad[r].store(kept + r * n + i, lanes);
    if (sums == nullptr) return;
    const int64_t width = W > 0 ? W : taps.width;
#pragma GCC unroll 4
    for (int64_t k = 0; k < width; ++k) {
      V sum = V::load(sums + k * sums_stride + i, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum = fma(grad[r], V::load(rows[r + k] + i, lanes), sum);
      sum.store(sums + k * sums_stride + i, lanes);
    }
    V sum = V::load(sums + width * sums_stride + i, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum += grad[r];
    sum.store(sums + width * sums_stride + i, lanes);
  });
}

template <int R, class T, class A>
MMK_INLINE void output_gradients(const T* const* rows, const Taps<A>& taps, const A* bias, bool with_silu,
                                 const T* const* grads, A* kept, A* sums, int64_t sums_stride, int64_t n) {
  if (R > 1 && taps.width == 4) {
    return output_gradients_width<R, (R > 1 ? 4 : 0)>(rows, taps, bias, with_silu, grads, kept, sums, sums_stride, n);
  }
  if (R > 1 && taps.width == 2) {
    return output_gradients_width<R, (R > 1 ? 2 : 0)>(rows, taps, bias, with_silu, grads, kept, sums, sums_stride, n);
  }
  output_gradients_width<R, 0>(rows, taps, bias, with_silu, grads, kept, sums, sums_stride, n);
}

// The scratch memory of the backward pass, for slices of `most` channels.
template <class T, class A>
struct BackwardScratch {
  const void** rows;  // width + 3 pointers
  T *before, *zeros, *states;
  A *kept, *no_grad, *final;  // gradients of the outputs of a piece and of width - 1 more; zeros; one row

  static int64_t kept_rows(int64_t width) { return kConvPieceTokens + width - 1; }
  static int64_t bytes(int64_t width, int64_t most) {
    return sizeof(void*) * (width + kRowsAtOnce) + sizeof(T) * most * (2 * width - 1) +
           sizeof(A) * most * (kept_rows(width) + 2) + 7 * 64;
  }
  BackwardScratch(int64_t width, int64_t most) {
    Carver carver{static_cast<char*>(thread_scratch(bytes(width, most)))};
    rows = carver.take<const void*>(width + kRowsAtOnce);
    before = carver.take<T>(most * (width - 1));
    zeros = carver.take<T>(most);
    states = carver.take<T>(most * (width - 1));
    kept = carver.take<A>(most * kept_rows(width));
    no_grad = carver.take<A>(most);
    final = carver.take<A>(most);
    clear(zeros, most);
    clear(no_grad, most);
  }
};

// A piece and a slice in the backward pass.  kept row i belongs to position piece.begin + i.
template <class T, class A>
struct BackwardTask {
  const CausalConv1dBackward& a;
  Task<T, A> task;
  const BackwardScratch<T, A>& scratch;
  A* sums;  // null: not wanted

  template <int R>
  void keep(int64_t position, bool own) const {
    const T** rows = reinterpret_cast<const T**>(scratch.rows);
    const T* grads[R];
    for (int64_t k = 0; k < R + a.width - 1; ++k) rows[k] = task.input(position + k - (a.width - 1));
    for (int r = 0; r < R; ++r) grads[r] = task.read(a.grad_y, position + r);
    output_gradients<R>(rows, task.taps(), task.bias(), a.silu, grads,
                           scratch.kept + (position - task.piece.begin) * task.n, own ? sums : nullptr, a.dim, task.n);
  }

  // The row of grad_final that belongs to a position, in the arithmetic type; null: none.
  const A* final_row(int64_t position) const {
    const int64_t j = position - (task.piece.length - (a.width - 1));
    if (a.grad_final.data == nullptr || task.piece.final < 0 || j < 0) return nullptr;
    const T* from = static_cast<const T*>(a.grad_final.data) + task.piece.final * a.grad_final.row +
                    task.at * a.grad_final.channel + j * a.grad_final.time;
    widen_row(from, a.grad_final.channel, task.n, scratch.final);
    return scratch.final;
  }

  // The gradient of R inputs: the filter backwards over the kept gradients, those of positions `from` ... `to` only.
  template <int R>
  void spread(int64_t position, int64_t from, int64_t to, T* const* out) const {
    const A** rows = reinterpret_cast<const A**>(scratch.rows);
    for (int64_t k = 0; k < R + a.width - 1; ++k) {
      const int64_t source = position + k;
      rows[k] = source < from || source >= to ? scratch.no_grad : scratch.kept + (source - from) * task.n;
    }
    const Taps<A> taps = task.taps();
    const Taps<A> backwards{taps.row(a.width - 1), -taps.stride, taps.width};
    convolve<R>(rows, backwards, R == 1 ? final_row(position) : nullptr, false, out, task.n);
  }

  void run() const {
    const ConvPiece& piece = task.piece;
    int64_t p = piece.begin;
    if (piece.padding) {
      for (; p < piece.end; ++p) clear(task.output(a.grad_x, p), task.n);
      return;
    }
    task.load_states(scratch.before);
    for (; p + kRowsAtOnce <= piece.end; p += kRowsAtOnce) keep<kRowsAtOnce>(p, true);
    for (; p < piece.end; ++p) keep<1>(p, true);
    const int64_t reach = piece.end + a.width - 1;  // outputs of the next piece that read inputs of this one
    const int64_t to = reach < piece.length ? reach : piece.length;
    for (; p < to; ++p) keep<1>(p, false);
    const int64_t plain = piece.length - (a.width - 1);  // from here on an input may be part of the final states
    for (p = piece.begin; p + kRowsAtOnce <= piece.end && p + kRowsAtOnce <= plain; p += kRowsAtOnce) {
      T* out[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; ++r) out[r] = task.output(a.grad_x, p + r);
      spread<kRowsAtOnce>(p, piece.begin, to, out);
    }
    for (; p < piece.end; ++p) {
      T* out[1] = {task.output(a.grad_x, p)};
      spread<1>(p, piece.begin, to, out);
    }
    if (piece.begin == 0 && piece.initial >= 0 && a.grad_initial.data != nullptr) initial_states(to);
  }

  void initial_states(int64_t to) const {
    for (int64_t j = 0; j < a.width - 1; ++j) {
      T* out[1] = {scratch.states + j * task.n};
      spread<1>(j - (a.width - 1), 0, to, out);
    }
    T* row = static_cast<T*>(a.grad_initial.data) + task.piece.initial * a.grad_initial.row +
             task.at * a.grad_initial.channel;
    scatter_rows(scratch.states, task.n, a.grad_initial.channel, a.grad_initial.time, a.width - 1, task.n, row);
  }
};

template <class T>
void backward(const CausalConv1dBackward& a) {
  using A = Arithmetic<T>;
  const Slices slices(a.dim, 4096);
  const int64_t per_block = (a.piece_count + a.blocks - 1) / a.blocks;
  const int64_t work = slices.size * mean_tokens(a) * per_block;
  parallel_for(a.blocks * slices.count, grain_of(work), [&](int64_t first, int64_t last) {
    const BackwardScratch<T, A> scratch(a.width, slices.size);
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i / slices.count, slice = i % slices.count;
      const int64_t at = slices.begin(slice), n = slices.length(slice);
      A* sums = a.sums == nullptr ? nullptr : static_cast<A*>(a.sums) + block * (a.width + 1) * a.dim + at;
      for (int64_t k = 0; sums != nullptr && k <= a.width; ++k) clear(sums + k * a.dim, n);
      const int64_t end = (block + 1) * per_block < a.piece_count ? (block + 1) * per_block : a.piece_count;
      for (int64_t p = block * per_block; p < end; ++p) {
        const Task<T, A> task{a, a.pieces[p], at, n, scratch.before, scratch.zeros};
        BackwardTask<T, A>{a, task, scratch, sums}.run();
      }
    }
  });
}

// Adds up the partial sums of the blocks, first to last, into the first.
template <class A>
void reduce_blocks(const CausalConv1dBackward& a) {
  if (a.sums == nullptr) return;
  A* sums = static_cast<A*>(a.sums);
  const int64_t count = (a.width + 1) * a.dim;
  parallel_for(count, grain_of(a.blocks), [&](int64_t begin, int64_t end) {
    for (int64_t block = 1; block < a.blocks; ++block) {
      for_lanes<Vec<A>>(end - begin, [&](int64_t i, auto lanes) {
        A* to = sums + begin + i;
        (Vec<A>::load(to, lanes) + Vec<A>::load(to + block * count, lanes)).store(to, lanes);
      });
    }
  });
}

}  // namespace

void causal_conv1d_fwd(const CausalConv1dForward& a) {
  with_storage(a.storage, [&](auto element) { forward<decltype(element)>(a); });
}

void causal_conv1d_bwd(const CausalConv1dBackward& a) {
  with_storage(a.storage, [&](auto element) {
    backward<decltype(element)>(a);
    reduce_blocks<Arithmetic<decltype(element)>>(a);
  });
}

}  // namespace mmkernels::MMK_ISA_NS
