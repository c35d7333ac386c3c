// a -> b(a) = argmax over odd places b of cos(m_a, m_b), a even; the `merged` links of largest cosine, best first.
// ToMe, arXiv 2210.09461, section 3; formulas in the op's README.
//
// The unit vectors are made once: of even places as rows, of odd ones turned, in panels of a register tile's columns.
// A task owns a block of even places.  It multiplies them with one panel after the other and keeps of each row the
// largest cosine and its column, lane by lane: the matrix of all cosines is nowhere.  Every cosine is the same sum in
// the same order wherever it stands: equal tokens are equally alike, and of equal cosines the lower place wins.
#include "cpu/token_pruning.h"

#include "common/arena.h"
#include "common/parallel.h"
#include "cpu/ssd_tile.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int64_t kRows = 24;  // of a task: whole register tiles, and a block of cosines that stays in L1

// The i-th of the even places that may merge is token 2 (i + evens), the j-th of the odd ones 2 (j + odds) + 1.
struct Places {
  int64_t evens, odds, rows, columns, room;  // room: columns up to whole panels
  explicit Places(const BipartiteMatching& a)
      : evens((a.protect + 1) / 2), odds(a.protect / 2), rows((a.tokens + 1) / 2 - evens),
        columns(a.tokens / 2 - odds), room((columns + kMatchingColumns - 1) / kMatchingColumns * kMatchingColumns) {}
  int64_t even(int64_t i) const { return 2 * (i + evens); }
  int64_t odd(int64_t j) const { return 2 * (j + odds) + 1; }
};

template <class A> constexpr int64_t kPanel = int64_t{kTileVectors} * Vec<A>::size;  // columns

template <class T> MMK_INLINE const T* token_of(const BipartiteMatching& a, int64_t b, int64_t token) {
  return static_cast<const T*>(a.metric) + b * a.batch_stride + token * a.row_stride;
}

// max(|x|, 1e-12): a vector of zeros stays one.
template <class A, class T> MMK_INLINE Vec<A> length(const T* x, int64_t n) {
  using V = Vec<A>;
  V squares;
  for_lanes<V>(n, [&](int64_t i, auto lanes) {
    const V v = V::load(x + i, lanes);
    squares = fma(v, v, squares);
  });
  const A norm = A(__builtin_sqrt(double(sum(squares))));
  return V(norm < A(1e-12) ? A(1e-12) : norm);
}

template <class T, class A>
void make_units(const BipartiteMatching& a, const Places& places, int64_t b) {
  using V = Vec<A>;
  A* even = static_cast<A*>(a.even) + b * places.rows * a.dim;
  for (int64_t i = 0; i < places.rows; ++i, even += a.dim) {
    const T* x = token_of<T>(a, b, places.even(i));
    const V norm = length<A>(x, a.dim);
    for_lanes<V>(a.dim, [&](int64_t c, auto lanes) { (V::load(x + c, lanes) / norm).store(even + c, lanes); });
  }
  A* odd = static_cast<A*>(a.odd) + b * places.room * a.dim;
  for (int64_t j = 0; j < places.columns; j += V::size) {
    A* to = odd + j / kPanel<A> * kPanel<A> * a.dim + j % kPanel<A>;
    const int64_t height = places.columns - j < V::size ? places.columns - j : V::size;
    const T* rows[V::size];
    V norms[V::size];
    for (int64_t i = 0; i < height; ++i) {
      rows[i] = token_of<T>(a, b, places.odd(j + i));
      norms[i] = length<A>(rows[i], a.dim);
    }
    for_lanes<V>(a.dim, [&](int64_t c, auto lanes) {
      V square[V::size];  // columns behind the last one are zeros
      for (int64_t i = 0; i < height; ++i) square[i] = V::load(rows[i] + c, lanes) / norms[i];
      transpose_square(square);
      const int64_t channels = a.dim - c < V::size ? a.dim - c : V::size;
      for (int64_t i = 0; i < channels; ++i) square[i].store(to + (c + i) * kPanel<A>);
    });
  }
}

// A block of even places: of each lane of each row the best cosine so far, and the number of the vector it was in.
template <class A>
struct Block {
  using V = Vec<A>;
  const BipartiteMatching& a;
  const Places& places;
  A *cosines, *best, *vector;

  Block(Arena& arena, const BipartiteMatching& call, const Places& where) : a(call), places(where) {
    cosines = arena.take<A>(kRows * kPanel<A>);
    best = arena.take<A>(kRows * V::size);
    vector = arena.take<A>(kRows * V::size);
  }

  void run(int64_t b, int64_t first) {
    const int64_t n = places.rows - first < kRows ? places.rows - first : kRows;
    const A* even = static_cast<const A*>(a.even) + (b * places.rows + first) * a.dim;
    const A* odd = static_cast<const A*>(a.odd) + b * places.room * a.dim;
    for (int64_t i = 0; i < n * V::size; ++i) best[i] = -static_cast<A>(__builtin_inf()), vector[i] = A(0);
    for (int64_t column = 0; column < places.columns; column += kPanel<A>) {
      const int64_t width = places.columns - column < kPanel<A> ? places.columns - column : kPanel<A>;
      multiply(Product<A>{n, width, a.dim, even, a.dim, 1, odd + column * a.dim, kPanel<A>, cosines, kPanel<A>});
      for (int64_t i = 0; i < n; ++i) keep_best(i, column, width);
    }
    for (int64_t i = 0; i < n; ++i) settle(i, b * places.rows + first + i);
  }

  MMK_INLINE void keep_best(int64_t row, int64_t column, int64_t width) {
    A* x = cosines + row * kPanel<A>;
    // Only a larger one replaces: of equal cosines a lane keeps the first.
    for (int64_t j = width; j % V::size != 0; ++j) x[j] = -static_cast<A>(__builtin_inf());
    V most = V::load(best + row * V::size), at = V::load(vector + row * V::size);
    for (int64_t j = 0; j < width; j += V::size) {
      const V value = V::load(x + j);
      const auto above = value > most;
      most = select<A>(above, value, most);
      at = select<A>(above, V(A((column + j) / V::size)), at);
    }
    most.store(best + row * V::size);
    at.store(vector + row * V::size);
  }

  void settle(int64_t row, int64_t to) {
    A most = -static_cast<A>(__builtin_inf());
    int64_t link = 0;
    for (int64_t lane = 0; lane < V::size; ++lane) {
      const A value = best[row * V::size + lane];
      const int64_t column = static_cast<int64_t>(vector[row * V::size + lane]) * V::size + lane;
      if (value > most || (value == most && column < link)) most = value, link = column;
    }
    static_cast<A*>(a.cosine)[to] = most;
    a.link[to] = link;
  }
};

// The numbers 0 .. n-1 in the order of falling values, equal ones rising: sorted runs of 1, 2, 4, ... are merged.
template <class A>
const int64_t* ranked(const A* values, int64_t n, int64_t* from, int64_t* to) {
  for (int64_t i = 0; i < n; ++i) from[i] = i;
  for (int64_t run = 1; run < n; run *= 2) {
    for (int64_t first = 0; first < n; first += 2 * run) {
      const int64_t middle = first + run < n ? first + run : n, last = middle + run < n ? middle + run : n;
      int64_t left = first, right = middle;
      for (int64_t i = first; i < last; ++i) {
        const bool later = right < last && (left == middle || values[from[right]] > values[from[left]]);
        to[i] = from[later ? right : left];
        right += later ? 1 : 0;
        left += later ? 0 : 1;
      }
    }
    int64_t* sorted = to;
    to = from, from = sorted;
  }
  return from;
}

// The outputs of a sample, from its even places in the order of their cosines.
template <class A>
void write_plan(const BipartiteMatching& a, const Places& places, int64_t b, const int64_t* order) {
  int64_t* keep = a.keep_indices + b * (a.tokens - a.merged);
  int64_t* slot = a.assignment + b * a.tokens;
  int64_t* source = a.source + b * a.merged;
  for (int64_t token = 0; token < a.tokens; ++token) slot[token] = 0;
  for (int64_t i = 0; i < a.merged; ++i) {
    source[i] = places.even(order[i]);
    static_cast<A*>(a.similarity)[b * a.merged + i] = static_cast<const A*>(a.cosine)[b * places.rows + order[i]];
    slot[source[i]] = -1;
  }
  int64_t place = 0;
  const int64_t step = a.sets ? 2 : 1;
  for (int64_t start = 0; start < step; ++start) {
    for (int64_t token = start; token < a.tokens; token += step) {
      if (slot[token] < 0) continue;
      keep[place] = token;
      slot[token] = place++;
    }
  }
  for (int64_t i = 0; i < a.merged; ++i) slot[source[i]] = slot[places.odd(a.link[b * places.rows + order[i]])];
}

template <class T>
void match(const BipartiteMatching& a) {
  using A = Arithmetic<T>;
  const Places places(a);
  if (a.merged > 0) {
    parallel_for(a.batch, grain_of(a.tokens * a.dim), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) make_units<T, A>(a, places, b);
    });
    const int64_t blocks = (places.rows + kRows - 1) / kRows;
    parallel_for(a.batch * blocks, grain_of(kRows * places.columns * a.dim / 8), [&](int64_t begin, int64_t end) {
      Arena measure{nullptr};
      Block<A>(measure, a, places);
      Arena arena{static_cast<char*>(thread_scratch(measure.used))};
      Block<A> block(arena, a, places);
      for (int64_t task = begin; task < end; ++task) block.run(task / blocks, task % blocks * kRows);
    });
  }
  parallel_for(a.batch, grain_of(8 * a.tokens), [&](int64_t begin, int64_t end) {
    int64_t* scratch = static_cast<int64_t*>(thread_scratch(sizeof(int64_t) * static_cast<size_t>(a.tokens + 2)));
    for (int64_t b = begin; b < end; ++b) {
      const A* cosine = static_cast<const A*>(a.cosine) + b * places.rows;
      const int64_t* order = a.merged > 0 ? ranked(cosine, places.rows, scratch, scratch + places.rows) : scratch;
      write_plan<A>(a, places, b, order);
    }
  });
}

}  // namespace

void bipartite_soft_matching(const BipartiteMatching& a) {
  if (a.batch == 0) return;
  with_storage(a.storage, [&](auto element) { match<decltype(element)>(a); });
}

}  // namespace mmkernels::MMK_ISA_NS
