// The orders in which directions read the tokens of a grid.
#pragma once

#include <vector>

#include "common/integers.h"

namespace mmkernels {

// (scans, seqlen) integers, each a permutation of the tokens: checked, as kernels write through them.
class Orders {
 public:
  int64_t count, length;

  Orders(const char* function, const Tensor& orders) : count(orders.size(0)), length(orders.size(1)), tokens_(integers_of(orders)) {
    STD_TORCH_CHECK(orders.dim() == 2 && count > 0, function, ": orders must be (scans, seqlen)");
    std::vector<int64_t> seen(static_cast<size_t>(length), -1);
    for (int64_t i = 0; i < count * length; ++i) {
      const int64_t token = tokens_[static_cast<size_t>(i)], scan = i / length;
      STD_TORCH_CHECK(token >= 0 && token < length && seen[static_cast<size_t>(token)] != scan, function,
                      ": orders must be permutations of the tokens");
      seen[static_cast<size_t>(token)] = scan;
    }
  }

  const int64_t* operator[](int64_t scan) const { return tokens_.data() + scan * length; }

 private:
  std::vector<int64_t> tokens_;
};

}  // namespace mmkernels
