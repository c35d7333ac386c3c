// Small integer tensors (offsets, ids, slots) as plain int64, whatever their dtype and strides.  Stable ABI only.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace mmkernels {

// The elements of an int32 or int64 tensor of one or two dimensions, row by row.
inline std::vector<int64_t> integers_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, "integers have one or two dimensions");
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, "integers must be int32 or int64");
  const int64_t rows = tensor.dim() == 2 ? tensor.size(0) : 1, row_stride = tensor.dim() == 2 ? tensor.stride(0) : 0;
  const int64_t columns = tensor.size(tensor.dim() - 1), stride = tensor.stride(tensor.dim() - 1);
  const void* data = tensor.const_data_ptr();
  std::vector<int64_t> values(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = r * row_stride + c * stride;
      values[static_cast<size_t>(r * columns + c)] =
          wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
    }
  }
  return values;
}

// Which slot each row of a batch has; without state_indices row i has slot i.
class Slots {
 public:
  Slots(const char* function, const std::optional<Tensor>& state_indices, int64_t batch, int64_t slots)
      : given_(state_indices.has_value()) {
    if (!given_) {
      STD_TORCH_CHECK(batch == slots, function, ": rows and states must be equally many without state_indices");
      return;
    }
    STD_TORCH_CHECK(state_indices->dim() == 1 && state_indices->size(0) == batch, function,
                    ": state_indices must be (batch,)");
    values_ = integers_of(*state_indices);
    for (const int64_t slot : values_) {
      STD_TORCH_CHECK(slot < slots, function, ": state_indices must be below ", slots, "; got ", slot);
    }
  }
  const int64_t* data() const { return given_ ? values_.data() : nullptr; }

 private:
  bool given_;
  std::vector<int64_t> values_;
};

}  // namespace mmkernels
