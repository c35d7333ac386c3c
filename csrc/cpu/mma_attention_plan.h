// The cut of a call into tasks of about equal cost.  For the torch side and for tests, not for kernels: uses std.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/mma_attention.h"

namespace mmkernels {

// Live scores of every query row, (batch, qlen): how long its part of a task takes.
inline std::vector<double> attention_row_costs(const Attention& a) {
  std::vector<double> costs(static_cast<size_t>(a.batch * a.qlen));
  const auto keys = [&](int64_t k0, int64_t k1) {
    return static_cast<double>(std::max<int64_t>(0, std::min(k1, a.klen) - std::max<int64_t>(k0, 0)));
  };
  for (int64_t b = 0; b < a.batch; ++b) {
    double* cost = costs.data() + b * a.qlen;
    for (int64_t i = 0; i < a.qlen; ++i) cost[i] = 16 + keys(a.row_start[b * a.qlen + i], a.row_end[b * a.qlen + i]);
    for (int64_t n = a.rects_before[b]; n < a.rects_before[b + 1]; ++n) {
      const AttentionRect& rect = a.rects[n];
      const int64_t last = std::min<int64_t>(rect.q1, a.qlen);
      for (int64_t i = std::max<int32_t>(rect.q0, 0); i < last; ++i) cost[i] += keys(rect.k0, rect.k1);
    }
  }
  return costs;
}

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> share;
  int64_t most_rows = 0;

  // Tasks of up to chunk_rows query rows, kv_heads heads of keys and split_keys keys, for `shares` threads.
  AttentionPlan(const Attention& a, int64_t chunk_rows, int64_t kv_heads, int64_t splits, int64_t split_keys,
                int64_t shares) {
    const std::vector<double> costs = attention_row_costs(a);
    const int64_t group_rows = a.heads / a.kv_heads * a.qlen;
    std::vector<double> cost;
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t head = 0; head < a.kv_heads; head += kv_heads) {
        // One task at least: gradients and masses are zero, not absent, where there are no queries.
        for (int64_t begin = 0; begin == 0 || begin < group_rows; begin += chunk_rows) {
          const int64_t rows = std::min(chunk_rows, group_rows - begin);
          double live = 0;
          for (int64_t r = begin; r < begin + rows; ++r) live += costs[static_cast<size_t>(b * a.qlen + r % a.qlen)];
          most_rows = std::max(most_rows, rows);
          for (int64_t s = 0; s < splits; ++s) {
            const int64_t first = std::min(a.klen, s * split_keys);
            const int64_t last = splits == 1 ? a.klen : std::min(a.klen, first + split_keys);
            tasks.push_back({b, head, std::min(kv_heads, a.kv_heads - head), begin, rows, s, first, last});
            cost.push_back(live);
          }
        }
      }
    }
    share_out(cost, shares);
  }

  void share_out(const std::vector<double>& cost, int64_t shares) {
    double whole = 0, passed = 0;
    for (const double one : cost) whole += one;
    share.push_back(0);
    for (size_t i = 0; i < cost.size(); ++i) {
      // Task i opens a share when its middle lies behind that share's begin.
      const double middle = (passed + cost[i] / 2) * static_cast<double>(shares) / whole;
      while (static_cast<int64_t>(share.size()) < shares && middle >= static_cast<double>(share.size())) {
        share.push_back(static_cast<int64_t>(i));
      }
      passed += cost[i];
    }
    share.push_back(static_cast<int64_t>(cost.size()));
  }

  void fill(Attention& a) const {
    a.task = tasks.data(), a.share = share.data(), a.shares = static_cast<int64_t>(share.size()) - 1;
    a.most_rows = most_rows;
  }
};

}  // namespace mmkernels
