// The merged norm's kernels without torch (alone.h): every storage type, scans, gates, group sizes around the vector
// widths.
#include "alone.h"
#include "cpu/gated_rms_norm.h"
#include "cpu/merged_gated_rms_norm.h"

namespace {

void norm(Storage storage, int64_t scans, int64_t seqlen, int64_t groups, int64_t group_size, bool gate, bool shared) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const int64_t batch = 2, dim = groups * group_size, parameters = shared ? group_size : dim;
  const int64_t tokens = batch * seqlen;
  const auto y = values(storage, tokens * scans * dim), z = values(storage, tokens * dim), grad = z;
  const auto weight = values(wide, parameters);
  auto out = unwritten(storage, tokens * dim), rstd = unwritten(wide, tokens * scans * groups);
  MergedGatedRmsNormForward f;
  f.storage = storage;
  f.batch = batch, f.scans = scans, f.seqlen = seqlen, f.dim = dim;
  f.group_size = group_size;
  f.parameter_stride = shared ? 0 : group_size;
  f.eps = 1e-5, f.factor = 1.0 / static_cast<double>(scans);
  f.y = {y.data(), scans * seqlen * dim, seqlen * dim, dim};
  if (gate) f.z = {z.data(), seqlen * dim, 0, dim};
  f.weight = weight.data();
  f.out = out.data();
  f.rstd = nullptr;
  merged_gated_rms_norm_fwd(f);
  require_numbers("out without statistics", storage, out);
  out = unwritten(storage, tokens * dim);
  f.out = out.data();
  f.rstd = rstd.data();
  merged_gated_rms_norm_fwd(f);
  require_numbers("out", storage, out);
  require_numbers("rstd", wide, rstd);

  MergedGatedRmsNormBackward b;
  static_cast<MergedGatedRmsNorm&>(b) = f;
  b.grad_out = {grad.data(), seqlen * dim, 0, dim};
  b.rstd = rstd.data();
  auto grad_y = unwritten(storage, tokens * scans * dim), grad_z = unwritten(storage, tokens * dim);
  b.grad_y = grad_y.data();
  b.grad_z = gate ? grad_z.data() : nullptr;
  b.row_blocks = gated_rms_norm_row_blocks(tokens);
  b.parameter_count = parameters;
  auto grad_weight = unwritten(wide, b.row_blocks * parameters);
  b.grad_weight = grad_weight.data();
  merged_gated_rms_norm_bwd(b);
  require_numbers("grad_y", storage, grad_y);
  if (gate) require_numbers("grad_z", storage, grad_z);
  require_numbers("grad_weight", wide, grad_weight);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (int64_t group_size : {1, 3, 16, 37}) {
      for (int64_t seqlen : {1, 35}) {
        norm(storage, 1, seqlen, 2, group_size, false, false);
        norm(storage, 2, seqlen, 3, group_size, true, true);
        norm(storage, 4, seqlen, 1, group_size, true, false);
      }
    }
  }
  std::puts("ok");
  return 0;
}
