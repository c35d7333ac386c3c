// Runs the kernels without torch on buffers of exactly the right size, for AddressSanitizer and UBSan; prints "ok".
// Scratch memory is NaN-poisoned in this build, and every output is checked for NaN: nothing may be left unwritten.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "cpu/gated_rms_norm.h"

namespace mmkernels {

void parallel_pieces(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  // The smallest pieces the grain allows, last one first: kernels may not rely on an order.
  for (int64_t begin = (count - 1) / grain * grain; begin >= 0; begin -= grain) {
    body(begin, begin + grain < count ? begin + grain : count, context);
  }
}

}  // namespace mmkernels

using namespace mmkernels;

namespace {

size_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

// `n` elements near 1 of a storage type, in memory of exactly their size.
std::vector<unsigned char> values(Storage storage, int64_t n) {
  std::vector<unsigned char> memory(n * bytes_of(storage));
  for (int64_t i = 0; i < n; ++i) {
    const double value = 1.0 + static_cast<double>(i % 7) / 8;
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    const uint16_t brain = static_cast<uint16_t>(word >> 16);
    const uint16_t half = static_cast<uint16_t>((word - (112u << 23)) >> 13);
    const void* source = storage == Storage::f64   ? static_cast<const void*>(&value)
                         : storage == Storage::f32 ? static_cast<const void*>(&single)
                         : storage == Storage::f16 ? static_cast<const void*>(&half)
                                                   : static_cast<const void*>(&brain);
    std::memcpy(memory.data() + i * bytes_of(storage), source, bytes_of(storage));
  }
  return memory;
}

// All ones: a NaN in every format.
std::vector<unsigned char> unwritten(Storage storage, int64_t n) {
  return std::vector<unsigned char>(n * bytes_of(storage), 0xff);
}

void require_written(const char* what, Storage storage, const std::vector<unsigned char>& memory) {
  const size_t size = bytes_of(storage);
  for (size_t i = 0; i < memory.size(); i += size) {
    bool ones = true;
    for (size_t b = 0; b < size; ++b) ones = ones && memory[i + b] == 0xff;
    if (ones) {
      std::printf("%s: element %zu was not written\n", what, i / size);
      std::exit(1);
    }
  }
}

void norm(Storage storage, int64_t rows, int64_t groups, int64_t group_size, bool gate, bool last, bool shared) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t dim = groups * group_size, parameters = shared ? group_size : dim;
  auto x = values(storage, rows * dim), z = values(storage, rows * dim), grad = values(storage, rows * dim);
  auto weight = values(wide, parameters), bias = values(wide, parameters);
  auto y = unwritten(storage, rows * dim), grad_x = y, grad_z = y;
  auto rstd = unwritten(wide, rows * groups);
  GatedRmsNormForward f;
  f.storage = storage;
  f.rows = rows;
  f.dim = dim;
  f.group_size = group_size;
  f.parameter_stride = shared ? 0 : group_size;
  f.norm_before_gate = last;
  f.eps = 1e-5;
  f.x = {x.data(), dim};
  if (gate) f.z = {z.data(), dim};
  f.weight = weight.data();
  f.bias = bias.data();
  f.y = {y.data(), dim};
  f.rstd = rstd.data();
  gated_rms_norm_fwd(f);
  require_written("y", storage, y);
  require_written("rstd", wide, rstd);

  GatedRmsNormBackward b;
  static_cast<GatedRmsNorm&>(b) = f;
  b.grad_y = {grad.data(), dim};
  b.rstd = rstd.data();
  b.grad_x = {grad_x.data(), dim};
  b.grad_z = {gate ? grad_z.data() : nullptr, dim};
  b.row_blocks = gated_rms_norm_row_blocks(rows);
  b.parameter_count = parameters;
  auto grad_weight = unwritten(wide, b.row_blocks * parameters), grad_bias = grad_weight;
  b.grad_weight = grad_weight.data();
  b.grad_bias = grad_bias.data();
  gated_rms_norm_bwd(b);
  require_written("grad_x", storage, grad_x);
  if (gate) require_written("grad_z", storage, grad_z);
  require_written("grad_weight", wide, grad_weight);
  require_written("grad_bias", wide, grad_bias);
}

}  // namespace

int main(int, char** arguments) {
  Isa level = Isa::baseline;
  while (std::strcmp(arguments[1], kIsaNames[static_cast<int>(level)]) != 0) {
    level = static_cast<Isa>(static_cast<int>(level) + 1);
  }
  if (!set_isa(level)) return 2;
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int64_t group_size : {1, 3, 16, 37}) {
      for (int64_t rows : {1, 33, 70}) {
        norm(storage, rows, 2, group_size, false, false, false);
        norm(storage, rows, 3, group_size, true, false, true);
        norm(storage, rows, 1, group_size, true, true, false);
      }
    }
  }
  std::puts("ok");
  return 0;
}
