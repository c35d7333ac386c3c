// Exact top-k of each sample, ties to the lower index, in raster order, with the gather of what is kept.
// The selection step of VTC-CLS, arXiv 2412.05819; derivation in the op's README.
//
// Scores become integers of the same order, and the k-th largest is found bit by bit, from the highest: a bit is 1 if at
// least k keys have it, given the bits before.  That is one count over all keys for each bit, whole vectors at a time, of
// keys that stay in L1.  One walk over the tokens then keeps those above that score and the first of those that equal it, so
// that raster order costs nothing.  A task owns a sample.
#include "cpu/token_pruning.h"

#include "common/arena.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

// Signed integers in the order of the scores: -0 is 0, and NaN is below -inf.
MMK_INLINE int32_t key_of(float value) {
  const int32_t bits = bit_cast<int32_t>(value == 0 ? 0.0f : value);
  const int32_t key = bits < 0 ? bits ^ INT32_MAX : bits;
  return value != value ? INT32_MIN : key;
}
MMK_INLINE int64_t key_of(double value) {
  const int64_t bits = bit_cast<int64_t>(value == 0 ? 0.0 : value);
  const int64_t key = bits < 0 ? bits ^ INT64_MAX : bits;
  return value != value ? INT64_MIN : key;
}

template <class Key> struct KeyTypes;
template <> struct KeyTypes<int32_t> { using Unsigned = uint32_t; };
template <> struct KeyTypes<int64_t> { using Unsigned = uint64_t; };

// How many of n keys, padded to whole groups of 4 vectors, are at least `least`.
template <class Key>
MMK_INLINE int64_t count_from(const Key* keys, int64_t n, Key least) {
  typedef Key Lanes __attribute__((vector_size(MMK_VECTOR_BYTES)));
  constexpr int64_t size = MMK_VECTOR_BYTES / sizeof(Key);
  const Lanes bar = Lanes{} + least;
  Lanes counts[4] = {};
  for (int64_t i = 0; i < n; i += 4 * size) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      Lanes lanes;
      __builtin_memcpy(&lanes, keys + i + v * size, sizeof(lanes));
      counts[v] -= static_cast<Lanes>(lanes >= bar);  // a lane that holds is -1
    }
  }
  const Lanes both = counts[0] + counts[1] + counts[2] + counts[3];
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) total += both[i];
  return total;
}

// Groups of 4 vectors.
template <class Key> MMK_INLINE int64_t padded_keys(int64_t n) {
  constexpr int64_t group = 4 * MMK_VECTOR_BYTES / sizeof(Key);
  return (n + group - 1) / group * group;
}

// The count-th largest of the keys (1 <= count <= n), and how many that equal it belong to the `count` largest.
template <class Key>
Key threshold(Key* keys, int64_t n, int64_t count, int64_t& equal) {
  using Unsigned = typename KeyTypes<Key>::Unsigned;
  constexpr int kBits = 8 * sizeof(Key);
  constexpr Unsigned kSign = Unsigned(1) << (kBits - 1);
  constexpr Key kLowest = static_cast<Key>(kSign);
  const int64_t whole = padded_keys<Key>(n);
  for (int64_t i = n; i < whole; ++i) keys[i] = kLowest;  // NaN's: counted by no bar above it
  Unsigned found = 0;
  int64_t above = n;  // keys that are at least `found`
  for (int bit = kBits - 1; bit >= 0 && above != count; --bit) {
    const Unsigned higher = found | Unsigned(1) << bit;
    const int64_t have = count_from(keys, whole, static_cast<Key>(higher ^ kSign));
    if (have >= count) found = higher, above = have;
  }
  const Key least = static_cast<Key>(found ^ kSign);
  if (above == count) {  // all of them, ties or not
    equal = count;
    return least;
  }
  // The bits are all settled: `least` is a key, and there are more like it than places.
  equal = least == static_cast<Key>(~kSign) ? count : count - count_from(keys, whole, static_cast<Key>(least + 1));
  return least;
}

// A null pointer is fine where there is nothing to copy.
MMK_INLINE void copy(char* to, const char* from, int64_t bytes) {
  if (bytes > 0) __builtin_memcpy(to, from, static_cast<size_t>(bytes));
}
MMK_INLINE void clear(char* to, int64_t bytes) {
  if (bytes > 0) __builtin_memset(to, 0, static_cast<size_t>(bytes));
}

struct Outputs {
  const PruneTokens& a;
  int64_t sample;

  MMK_INLINE void keep(int64_t slot, int64_t index, int64_t place) const {
    copy(a.kept_features + slot * a.row_bytes, row(index), a.row_bytes);
    a.keep_indices[slot] = index;
    char* position = a.kept_positions + slot * a.position_bytes;
    if (a.position_ids != nullptr) {
      copy(position, a.position_ids + (sample * a.tokens + index) * a.position_bytes, a.position_bytes);
    } else {
      __builtin_memcpy(position, &place, sizeof(place));
    }
    a.kept_mask[slot] = 1;
  }

  MMK_INLINE void pad(int64_t slot) const {
    clear(a.kept_features + slot * a.row_bytes, a.row_bytes);
    a.keep_indices[slot] = -1;
    clear(a.kept_positions + slot * a.position_bytes, a.position_bytes);
    a.kept_mask[slot] = 0;
  }

  MMK_INLINE const char* row(int64_t index) const {
    return a.features + sample * a.batch_stride + index * a.row_stride;
  }

  // A kept row seldom follows the last one, and no hardware guesses where it is: its first lines, early.
  MMK_INLINE void expect(int64_t index) const {
    const char* from = row(index);
    for (int64_t i = 0; i < a.row_bytes && i < 1024; i += 64) __builtin_prefetch(from + i);
  }
};

// Writes the places of keys above `least`, and of the first `equal` that equal it, in rising order; `to` has room for one
// place more than there are keys.  No branch depends on a score.
template <class Key>
MMK_INLINE int64_t collect(const Key* keys, int64_t n, Key least, int64_t equal, int64_t* to) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = keys[i] == least;
    to[found] = i;
    found += static_cast<int64_t>(keys[i] > least) | static_cast<int64_t>(tie && equal > 0);
    equal -= tie ? 1 : 0;
  }
  return found;
}

template <class Score, class Key>
void prune_sample(const PruneTokens& a, int64_t b, Key* keys, int64_t* kept) {
  const Score* scores = static_cast<const Score*>(a.scores) + b * a.tokens;
  const uint8_t* mask = a.mask == nullptr ? nullptr : a.mask + b * a.tokens;
  int64_t candidates = 0;
  if (mask == nullptr) {
    for (int64_t i = 0; i < a.tokens; ++i) keys[i] = key_of(scores[i]);
    candidates = a.tokens;
  } else {
    for (int64_t i = 0; i < a.tokens; ++i) {
      if (mask[i]) keys[candidates++] = key_of(scores[i]);
    }
  }
  const int64_t share = a.starts[b + 1] - a.starts[b], count = share < candidates ? share : candidates;
  const int64_t first = a.packed ? a.starts[b] : b * a.width, slots = a.packed ? share : a.width;
  const Outputs to{a, b};
  if (count > 0) {
    int64_t equal;
    const Key least = threshold(keys, candidates, count, equal);
    collect(keys, candidates, least, equal, kept);
    if (mask != nullptr) {  // the place among candidates becomes the place among tokens
      for (int64_t i = 0, candidate = 0, next = 0; next < count; ++i) {
        if (mask[i] && candidate++ == kept[next]) kept[next++] = i;
      }
    }
    to.expect(kept[0]);
    for (int64_t place = 0; place < count; ++place) {
      if (place + 1 < count) to.expect(kept[place + 1]);
      to.keep(first + place, kept[place], place);
    }
  }
  for (int64_t place = count; place < slots; ++place) to.pad(first + place);
}

template <class Score, class Key>
void run(const PruneTokens& a) {
  const int64_t slots = a.packed ? a.starts[a.batch] / a.batch : a.width;
  parallel_for(a.batch, grain_of(8 * a.tokens + slots * a.row_bytes / 4), [&](int64_t begin, int64_t end) {
    Arena measure{nullptr};
    measure.take<Key>(padded_keys<Key>(a.tokens));
    measure.take<int64_t>(a.tokens + 1);
    Arena arena{static_cast<char*>(thread_scratch(measure.used))};
    Key* keys = arena.take<Key>(padded_keys<Key>(a.tokens));
    int64_t* kept = arena.take<int64_t>(a.tokens + 1);
    for (int64_t b = begin; b < end; ++b) prune_sample<Score>(a, b, keys, kept);
  });
}

}  // namespace

void prune_tokens(const PruneTokens& a) {
  if (a.batch == 0) return;
  if (a.wide_scores) {
    run<double, int64_t>(a);
  } else {
    run<float, int32_t>(a);
  }
}

}  // namespace mmkernels::MMK_ISA_NS
