// The parts of a Mamba-2 step that are its own, without torch (alone.h): residual sum and norm, small parameters.
#include "alone.h"
#include "cpu/mamba2_step.h"

namespace {

void add(Storage hidden, Storage residual, Storage sum, int64_t dim, bool first) {
  constexpr int64_t rows = 3;
  const bool wide = sum == Storage::f64;
  const auto x = values(hidden, rows * dim), r = values(residual, rows * dim), weight = values(hidden, dim);
  auto total = unwritten(sum, rows * dim);
  auto normed = unwritten(wide ? Storage::f64 : Storage::f32, rows * dim);
  AddNorm call;
  call.hidden_storage = hidden;
  call.residual_storage = residual;
  call.sum_storage = sum;
  call.weight_storage = hidden;
  call.rows = rows;
  call.dim = dim;
  call.eps = 1e-5;
  call.hidden = {x.data(), dim};
  if (!first) call.residual = {r.data(), dim};
  call.sum = {total.data(), dim};
  call.weight = weight.data();
  call.normed = normed.data();
  add_norm(call);
  require_numbers("sum", sum, total);
  require_numbers("normed", wide ? Storage::f64 : Storage::f32, normed);
}

void widen_some(Storage storage, bool wide, bool negative_exp) {
  for (int64_t stride : {1, 3}) {
    constexpr int64_t count = 37;
    const auto from = values(storage, (count - 1) * stride + 1);
    auto to = unwritten(wide ? Storage::f64 : Storage::f32, count);
    widen({storage, wide, negative_exp, count, stride, from.data(), to.data()});
    require_numbers("widened", wide ? Storage::f64 : Storage::f32, to);
  }
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  constexpr Storage narrow[] = {Storage::f32, Storage::bf16, Storage::f16};
  for (int64_t dim : {1, 16, 37}) {
    for (Storage hidden : narrow) {
      for (Storage residual : narrow) add(hidden, residual, dim == 16 ? hidden : Storage::f32, dim, dim == 1);
    }
    add(Storage::f64, Storage::f64, Storage::f64, dim, false);
  }
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (bool wide : {false, true}) {
      widen_some(storage, wide, false);
      widen_some(storage, wide, true);
    }
  }
  std::puts("ok");
  return 0;
}
