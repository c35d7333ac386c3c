// parallel_pieces over torch's thread pool (parallel.h).
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace mmkernels {

void parallel_pieces(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  if (count <= grain) return body(0, count, context);
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace mmkernels
