// Fetching rows of memory into cache a little ahead of their use.
#pragma once

#include "common/arena.h"
#include "common/vec.h"

namespace mmkernels::MMK_ISA_NS {
namespace {

// Rows of memory that will be wanted soon.  Asking for all of them at once would make the processor wait (it keeps a few
// dozen misses in flight); a few between two tiles of a product cost nothing.
class Upcoming {
 public:
  Upcoming(Arena& arena, int64_t most) : rows_(arena.take<Row>(most)) {}
  MMK_INLINE void clear() { count_ = next_ = 0; }
  MMK_INLINE void read(const void* row, int64_t bytes) { add(row, bytes, false); }
  MMK_INLINE void write(const void* row, int64_t bytes) { add(row, bytes, true); }

  MMK_INLINE void fetch_some() {
    for (int64_t lines = 0; lines < kLinesAtOnce && next_ < count_; ++next_) {
      const Row& row = rows_[next_];
      for (int64_t i = 0; i < row.bytes; i += 64, ++lines) {
        row.write ? __builtin_prefetch(row.from + i, 1, 2) : __builtin_prefetch(row.from + i);
      }
    }
  }

 private:
  static constexpr int64_t kLinesAtOnce = 16;
  struct Row {
    const char* from;
    int32_t bytes;
    bool write;
  };

  MMK_INLINE void add(const void* row, int64_t bytes, bool write) {
    rows_[count_++] = {static_cast<const char*>(row), static_cast<int32_t>(bytes), write};
  }

  Row* rows_;
  int64_t count_ = 0, next_ = 0;
};

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
