// Between torch tensors and what kernels take: rows, storage types, outputs.  Stable ABI only, compiled once.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/rows.h"
#include "common/view.h"

namespace mmkernels {

using torch::headeronly::ScalarType;

inline Storage storage_of(const Tensor& tensor, const char* name) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return storage_of(dtype, name);
}

// What a kernel computes in when its elements are stored as `storage`.
inline ScalarType arithmetic_of(Storage storage) {
  return storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  return empty(sizes.data(), static_cast<int64_t>(sizes.size()), number);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A tensor seen as a matrix: every dimension but the last folded into rows.
struct Rows {
  Tensor owner;  // keeps the memory alive
  int64_t rows, dim, stride;

  RowsIn in() const { return {owner.const_data_ptr(), stride}; }
  RowsOut out() const { return {owner.mutable_data_ptr(), stride}; }
};

// The distance between rows if the leading dimensions fold into one and the last is dense; else -1.
inline int64_t row_stride(const View& view) {
  const int64_t *sizes = view.sizes, *strides = view.strides;
  const int64_t last = view.dim - 1;
  if (sizes[last] > 1 && strides[last] != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (stride < 0) stride = strides[d];
    if (expected >= 0 && strides[d] != expected) return -1;
    expected = strides[d] * sizes[d];
  }
  return stride < 0 ? sizes[last] : stride;
}

// Reads through the tensor's own strides where rows can be walked; copies otherwise (expanded or transposed tensors).
inline Rows rows_of(const Tensor& tensor, const View& view) {
  STD_TORCH_CHECK(view.dim >= 1, "a tensor of rows has at least one dimension");
  const int64_t dim = view.sizes[view.dim - 1];
  int64_t rows = dim == 0 ? 0 : 1;
  for (int64_t d = 0; d + 1 < view.dim; ++d) rows *= view.sizes[d];
  int64_t stride = rows == 0 ? 0 : row_stride(view);
  Tensor owner = stride < 0 ? torch::stable::contiguous(tensor) : tensor;
  if (stride < 0) stride = dim;
  return {owner, rows, dim, stride};
}
inline Rows rows_of(const Tensor& tensor) { return rows_of(tensor, View(tensor)); }

// A small parameter vector, dense and in the arithmetic type.
inline Tensor parameter_of(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(
      tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

inline void check_same(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim() && tensor.scalar_type() == like.scalar_type();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape and dtype of x");
}

}  // namespace mmkernels
