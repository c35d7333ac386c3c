// Exact top-k of each sample, ties to the lower index, in raster order, with the gather of what is kept.
// The selection step of VTC-CLS, arXiv 2412.05819; derivation in the op's README.
//
// A radix select finds the k-th largest score without sorting: scores become unsigned integers of the same order, and
// each digit, from the highest, is settled by counting.  One walk over the tokens then keeps those above that score and the
// first of those that equal it, so that raster order costs nothing.  A task owns a sample.
#include "cpu/token_pruning.h"

#include "common/parallel.h"
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {

namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Unsigned integers in the order of the scores: -0 is 0, and NaN is below -inf.
MMK_INLINE uint32_t key_of(float value) {
  if (value != value) return 0;
  const uint32_t bits = bit_cast<uint32_t>(value == 0 ? 0.0f : value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
MMK_INLINE uint64_t key_of(double value) {
  if (value != value) return 0;
  const uint64_t bits = bit_cast<uint64_t>(value == 0 ? 0.0 : value);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// The count-th largest of the keys (1 <= count <= n), and how many that equal it belong to the `count` largest.
template <class Key>
Key threshold(const Key* keys, int64_t n, int64_t count, int64_t& equal) {
  Key found = 0, settled = 0;
  for (int shift = 8 * static_cast<int>(sizeof(Key)) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    int64_t counts[kDigits] = {};
    for (int64_t i = 0; i < n; ++i) {
      if ((keys[i] & settled) == found) ++counts[(keys[i] >> shift) & (kDigits - 1)];
    }
    int digit = kDigits - 1;
    while (counts[digit] < count) count -= counts[digit--];
    found |= static_cast<Key>(digit) << shift;
    settled |= static_cast<Key>(kDigits - 1) << shift;
  }
  equal = count;
  return found;
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
  int64_t sample, slot;  // the next slot

  MMK_INLINE void keep(int64_t index, int64_t place) {
    copy(a.kept_features + slot * a.row_bytes, a.features + sample * a.batch_stride + index * a.row_stride,
         a.row_bytes);
    a.keep_indices[slot] = index;
    char* position = a.kept_positions + slot * a.position_bytes;
    if (a.position_ids != nullptr) {
      copy(position, a.position_ids + (sample * a.tokens + index) * a.position_bytes, a.position_bytes);
    } else {
      __builtin_memcpy(position, &place, sizeof(place));
    }
    a.kept_mask[slot++] = 1;
  }

  MMK_INLINE void pad() {
    clear(a.kept_features + slot * a.row_bytes, a.row_bytes);
    a.keep_indices[slot] = -1;
    clear(a.kept_positions + slot * a.position_bytes, a.position_bytes);
    a.kept_mask[slot++] = 0;
  }
};

template <class Score, class Key>
void prune_sample(const PruneTokens& a, int64_t b, Key* keys) {
  const Score* scores = static_cast<const Score*>(a.scores) + b * a.tokens;
  const uint8_t* mask = a.mask == nullptr ? nullptr : a.mask + b * a.tokens;
  int64_t candidates = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    if (mask == nullptr || mask[i]) keys[candidates++] = key_of(scores[i]);
  }
  const int64_t share = a.starts[b + 1] - a.starts[b], count = share < candidates ? share : candidates;
  const int64_t first = a.packed ? a.starts[b] : b * a.width, end = first + (a.packed ? share : a.width);
  Outputs to{a, b, first};
  if (count > 0) {
    int64_t equal;
    const Key least = threshold(keys, candidates, count, equal);
    for (int64_t i = 0, candidate = 0; i < a.tokens && to.slot < first + count; ++i) {
      if (mask != nullptr && !mask[i]) continue;
      const Key key = keys[candidate++];
      if (key > least || (key == least && equal-- > 0)) to.keep(i, to.slot - first);
    }
  }
  while (to.slot < end) to.pad();
}

template <class Score, class Key>
void run(const PruneTokens& a) {
  const int64_t slots = a.packed ? a.starts[a.batch] / a.batch : a.width;
  parallel_for(a.batch, grain_of(8 * a.tokens + slots * a.row_bytes / 4), [&](int64_t begin, int64_t end) {
    Key* keys = static_cast<Key*>(thread_scratch(sizeof(Key) * static_cast<size_t>(a.tokens)));
    for (int64_t b = begin; b < end; ++b) prune_sample<Score>(a, b, keys);
  });
}

}  // namespace

void prune_tokens(const PruneTokens& a) {
  if (a.batch == 0) return;
  if (a.wide_scores) {
    run<double, uint64_t>(a);
  } else {
    run<float, uint32_t>(a);
  }
}

}  // namespace mmkernels::MMK_ISA_NS
