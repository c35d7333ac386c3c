// How a scan is cut into rows, chunks and tasks.  Compiled once (csrc/ops/ssd.cpp): no kernel code.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ssd.h"

namespace mmkernels {

// Tokens of a chunk.  Products of pairs of tokens grow with it, loading and storing the state shrinks; at headdim 64 and
// dstate 128 both cost about a tenth of the time at 64, and the pieces of a chunk fit the L2 cache of any CPU.
inline constexpr int64_t kSsdChunk = 64;

struct SsdPlan {
  std::vector<SsdRow> rows;
  std::vector<SsdChunk> chunks;
  int64_t most_chunks = 0, chunk_tokens = 1;
};

class SsdPlanner {
 public:
  SsdPlanner(int64_t chunk, bool reverse, bool initial) : chunk_(chunk), reverse_(reverse), initial_(initial) {}

  // Every element of the batch alike.
  void whole(int64_t batch, int64_t seqlen) {
    run(0, seqlen, 0, seqlen, true);
    close(0, 0);
    const SsdRow first = plan.rows[0];
    plan.rows.resize(static_cast<size_t>(batch), first);
    for (int64_t b = 0; b < batch; ++b) plan.rows[static_cast<size_t>(b)].batch = b;
  }

  // Sequence i is tokens [offsets[i], offsets[i + 1]).
  void packed(const int64_t* offsets, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = next();
      run(0, offsets[i + 1] - offsets[i], offsets[i], offsets[i + 1], true);
      close(0, begin);
    }
  }

  // One row of ids: unbroken runs of one id, scanned from the first; the id before the first token is 0.
  void ids(int64_t batch, const int64_t* id, int64_t seqlen) {
    const int64_t begin = next();
    const auto at = [&](int64_t position) { return id[reverse_ ? seqlen - 1 - position : position]; };
    for (int64_t p = 0; p < seqlen;) {
      int64_t end = p + 1;
      while (end < seqlen && (at(end) == at(p) || (at(end) < 0 && at(p) < 0))) ++end;
      if (at(p) < 0) {
        const int64_t token = reverse_ ? seqlen - 1 - p : p;
        plan.chunks.push_back({token, static_cast<int32_t>(end - p), SsdEntry::zero, false, true});
      } else {
        run(p, end - p, 0, seqlen, p == 0 && at(p) == 0);
      }
      p = end;
    }
    close(batch, begin);
  }

  SsdPlan plan;

 private:
  int64_t next() const { return static_cast<int64_t>(plan.chunks.size()); }

  // `count` tokens from scan position p of the sequence [begin, end), in chunks of nearly equal length.
  void run(int64_t p, int64_t count, int64_t begin, int64_t end, bool first) {
    if (count <= 0) return;
    const int64_t pieces = (count + chunk_ - 1) / chunk_, even = (count + pieces - 1) / pieces;
    const int64_t rounded = (even + 3) / 4 * 4, length = rounded < chunk_ ? rounded : chunk_;
    SsdEntry entry = first && initial_ ? SsdEntry::initial : SsdEntry::zero;
    for (int64_t done = 0; done < count; done += length, entry = SsdEntry::carried) {
      const int64_t tokens = count - done < length ? count - done : length, position = p + done;
      const int64_t token = reverse_ ? end - 1 - position : begin + position;
      plan.chunks.push_back({token, static_cast<int32_t>(tokens), entry, done + tokens < count, false});
      if (tokens > plan.chunk_tokens) plan.chunk_tokens = tokens;
    }
  }

  void close(int64_t batch, int64_t begin) {
    const int64_t end = next();
    if (end > begin && !plan.chunks.back().padding) plan.chunks.back().leaves = true;
    if (end - begin > plan.most_chunks) plan.most_chunks = end - begin;
    plan.rows.push_back({batch, begin, end});
  }

  int64_t chunk_;
  bool reverse_, initial_;
};

}  // namespace mmkernels
