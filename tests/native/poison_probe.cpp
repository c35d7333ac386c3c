// A library op that hands out memory nobody wrote, to see whether the test fixture poisons it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

static torch::stable::Tensor unwritten(int64_t n) {
  return torch::stable::empty({n}, torch::headeronly::ScalarType::Float);
}

STABLE_TORCH_LIBRARY(mmkernels_probe, m) { m.def("unwritten(int n) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(mmkernels_probe, CompositeExplicitAutograd, m) { m.impl("unwritten", TORCH_BOX(&unwritten)); }
