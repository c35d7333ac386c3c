// Tensors for ops that decoding calls for every token and layer, where asking costs as much as computing: everything a
// kernel asks of a tensor, asked once, and outputs allocated past the dispatcher.  Stable ABI only.
#pragma once

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include "common/pages.h"
#include "common/rows.h"

namespace mmkernels {

using torch::stable::Tensor;

// Torch's numbers of the dtypes that kernels know (Tensor::scalar_type() asks for all there are, one by one).
struct DtypeNumbers {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16(),
          f64 = aoti_torch_dtype_float64();
};
inline const DtypeNumbers& dtype_numbers() {
  static const DtypeNumbers numbers;
  return numbers;
}

inline Storage storage_of(int32_t dtype, const char* name) {
  const DtypeNumbers& numbers = dtype_numbers();
  if (dtype == numbers.f32) return Storage::f32;
  if (dtype == numbers.bf16) return Storage::bf16;
  if (dtype == numbers.f16) return Storage::f16;
  STD_TORCH_CHECK(dtype == numbers.f64, name, " must be float32, bfloat16, float16 or float64");
  return Storage::f64;
}

inline int32_t dtype_of(Storage storage) {
  const DtypeNumbers& numbers = dtype_numbers();
  switch (storage) {
    case Storage::f32: return numbers.f32;
    case Storage::bf16: return numbers.bf16;
    case Storage::f16: return numbers.f16;
    case Storage::f64: break;
  }
  return numbers.f64;
}

// A tensor's facts; of a tensor that is not given, none.  Valid while the tensor is.
struct View {
  int64_t dim = 0;
  int32_t dtype = -1;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  const void* data = nullptr;

  explicit View(AtenTensorHandle tensor) {
    if (tensor == nullptr) return;
    int64_t *sizes_ = nullptr, *strides_ = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides_));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
    sizes = sizes_;
    strides = strides_;
  }
  explicit View(const Tensor& tensor) : View(tensor.get()) {}
  explicit View(const std::optional<Tensor>& tensor) {
    if (tensor) *this = View(*tensor);
  }

  // The sizes one by one; kAbsent stands for a dimension that this call does not have.
  static constexpr int64_t kAbsent = -1;
  bool has_sizes(std::initializer_list<int64_t> wanted) const {
    int64_t d = 0;
    for (const int64_t size : wanted) {
      if (size == kAbsent) continue;
      if (d == dim || sizes[d++] != size) return false;
    }
    return d == dim;
  }
};

// A tensor of the dispatcher's stack, or none.  (TORCH_BOX makes a shared pointer of each, which for a dozen of them takes
// as long as a small step.)  Take all arguments off the stack before anything can throw: each owns its tensor.
class Argument {
 public:
  static Argument required(StableIValue value) { return Argument(torch::stable::detail::to<AtenTensorHandle>(value)); }
  static Argument optional(StableIValue value) {
    const StableIValue* inner = torch::stable::detail::to<const StableIValue*>(value);
    if (inner == nullptr) return Argument(nullptr);
    const StableIValue tensor = *inner;
    delete inner;
    return required(tensor);
  }
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  View view() const { return View(handle_); }
  void* mutable_data() const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  Tensor tensor() const {
    AtenTensorHandle another = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &another));
    return Tensor(another);
  }

 private:
  explicit Argument(AtenTensorHandle handle) : handle_(handle) {}
  AtenTensorHandle handle_;
};

// Whether fresh outputs are filled with NaN, so that a test sees what nobody wrote.
inline std::atomic<bool>& poisoning() {
  static std::atomic<bool> on{false};
  return on;
}

// Dense CPU memory that nobody has written yet.
inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {
  constexpr int64_t kMostDims = 64;  // as in torch
  STD_TORCH_CHECK(dim <= kMostDims, "a tensor has at most 64 dimensions");
  int64_t strides[kMostDims], count = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = count;
    count *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return made;
  }
  const size_t bytes = static_cast<size_t>(count) * aoti_torch_dtype_element_size(dtype);
  if (bytes >= kLargePages) prefer_large_pages(made.mutable_data_ptr(), bytes);
  if (poisoning().load(std::memory_order_relaxed)) std::memset(made.mutable_data_ptr(), 0xff, bytes);
  return made;
}

}  // namespace mmkernels
