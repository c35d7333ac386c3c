// A library op that hands out memory nobody wrote, to see whether the test fixture poisons it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/view.h"

static torch::stable::Tensor unwritten(int64_t n) {
  return torch::stable::empty({n}, torch::headeronly::ScalarType::Float);
}

// As kernels of ours allocate; this library has a switch of its own.
static torch::stable::Tensor unwritten_by_us(int64_t n) {
  mmkernels::poisoning().store(true);
  return mmkernels::empty(&n, 1, aoti_torch_dtype_bfloat16());
}

STABLE_TORCH_LIBRARY(mmkernels_probe, m) {
  m.def("unwritten(int n) -> Tensor");
  m.def("unwritten_by_us(int n) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(mmkernels_probe, CompositeExplicitAutograd, m) {
  m.impl("unwritten", TORCH_BOX(&unwritten));
  m.impl("unwritten_by_us", TORCH_BOX(&unwritten_by_us));
}
