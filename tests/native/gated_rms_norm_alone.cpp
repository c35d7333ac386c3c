// The norm's kernels without torch (alone.h): every storage type and gate, group sizes around the vector widths.
#include "alone.h"
#include "cpu/gated_rms_norm.h"

namespace {

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
  require_numbers("y", storage, y);
  require_numbers("rstd", wide, rstd);

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
  require_numbers("grad_x", storage, grad_x);
  if (gate) require_numbers("grad_z", storage, grad_z);
  require_numbers("grad_weight", wide, grad_weight);
  require_numbers("grad_bias", wide, grad_bias);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
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
