// Between torch tensors and what kernels take: rows, storage types, outputs.  Stable ABI only, compiled once.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/pages.h"
#include "common/rows.h"

namespace mmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::f32;
    case ScalarType::BFloat16: return Storage::bf16;
    case ScalarType::Half: return Storage::f16;
    case ScalarType::Double: return Storage::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
  return Storage::f32;
}

// What a kernel computes in when its elements are stored as `storage`.
inline ScalarType arithmetic_of(Storage storage) {
  return storage == Storage::f64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor made = torch::stable::empty(sizes, dtype);
  prefer_large_pages(made.mutable_data_ptr(), made.numel() * made.element_size());
  return made;
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
inline int64_t row_stride(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
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
inline Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1, "a tensor of rows has at least one dimension");
  int64_t stride = tensor.numel() == 0 ? 0 : row_stride(tensor);
  Tensor owner = stride < 0 ? torch::stable::contiguous(tensor) : tensor;
  const int64_t dim = tensor.size(tensor.dim() - 1);
  if (stride < 0) stride = dim;
  return {owner, dim == 0 ? 0 : tensor.numel() / dim, dim, stride};
}

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
