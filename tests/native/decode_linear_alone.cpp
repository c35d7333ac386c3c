// The kernel of decode_linear without torch (alone.h): storage types, odd sizes, strided rows, with and without bias.
#include "alone.h"
#include "cpu/decode_linear.h"

namespace {

void linear(Storage x_storage, Storage weight_storage, int64_t rows, int64_t in, int64_t out, bool bias) {
  const bool wide = x_storage == Storage::f64;
  const int64_t stride = in + 3;  // a view: the last row ends before the stride does
  const auto x = values(x_storage, rows * in), weight = values(weight_storage, (out - 1) * stride + in);
  const auto biases = values(weight_storage, out);
  auto y = unwritten(x_storage, rows * out);
  const int64_t packed = decode_linear_packed(rows, in) * (wide ? 8 : 4);
  void* workspace = nullptr;
  if (posix_memalign(&workspace, 64, packed) != 0) std::exit(3);
  std::memset(workspace, 0xff, packed);
  DecodeLinear call;
  call.x_storage = call.y_storage = x_storage;
  call.weight_storage = call.bias_storage = weight_storage;
  call.rows = rows;
  call.in = in;
  call.out = out;
  call.x = {x.data(), in};
  call.weight = {weight.data(), stride};
  call.bias = bias ? biases.data() : nullptr;
  call.y = {y.data(), out};
  call.packed = workspace;
  decode_linear(call);
  require_numbers("y", x_storage, y);
  std::free(workspace);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage x : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (Storage weight : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
      if ((x == Storage::f64) != (weight == Storage::f64)) continue;
      for (int64_t in : {1, 5, 33, 70, 4099}) {
        for (int64_t rows : {1, 2, 7}) linear(x, weight, rows, in, 13, rows == 2);
      }
    }
  }
  std::puts("ok");
  return 0;
}
