// The scan's kernels without torch (alone.h): every storage type, packings, both directions, sizes around the vector
// widths; buffers and scratch memory of exactly their size.
#include "alone.h"
#include "cpu/ssd.h"
#include "cpu/ssd_plan.h"

namespace {

struct Sizes {
  int64_t batch, seqlen, heads, groups, headdim, dstate;
};

enum class Packing { none, offsets, ids };

SsdPlan plan_of(const Sizes& s, Packing packing, bool reverse, bool states) {
  SsdPlanner planner(kSsdChunk, reverse, states);
  if (packing == Packing::none) planner.whole(s.batch, s.seqlen);
  if (packing == Packing::offsets) {
    const int64_t offsets[] = {0, s.seqlen / 3, s.seqlen / 3, s.seqlen};
    planner.packed(offsets, 3);
  }
  if (packing == Packing::ids) {
    std::vector<int64_t> ids(s.seqlen);
    for (int64_t t = 0; t < s.seqlen; ++t) ids[t] = t < s.seqlen / 4 ? 0 : t < s.seqlen / 2 ? -1 : 2;
    for (int64_t b = 0; b < s.batch; ++b) planner.ids(b, ids.data(), s.seqlen);
  }
  return planner.plan;
}

SsdIn dense(const void* data, int64_t seqlen, int64_t heads, int64_t width) {
  return {data, seqlen * heads * width, heads * width, width};
}

// Positions as tokens: every one once, no two neighbours side by side.
std::vector<int64_t> shuffled(int64_t n) {
  std::vector<int64_t> order(n);
  for (int64_t p = 0; p < n; ++p) order[p] = p % 2 == 0 ? n - 1 - p / 2 : p / 2;
  return order;
}

void scan(Storage storage, const Sizes& s, Packing packing, bool reverse, bool everything, int64_t blocks,
          bool ordered = false) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const SsdPlan plan = plan_of(s, packing, reverse, everything);
  const int64_t rows = static_cast<int64_t>(plan.rows.size()), tokens = s.batch * s.seqlen;
  const int64_t by_head = tokens * s.heads * s.headdim, by_group = tokens * s.groups * s.dstate;
  const int64_t by_state = rows * s.heads * s.headdim * s.dstate;
  const auto x = values(storage, by_head), z = x, grad = x, B = values(storage, by_group), C = B;
  const auto dt = values(wide, tokens * s.heads), D = values(wide, s.heads * s.headdim), bias = values(wide, s.heads);
  const auto initial = values(wide, by_state);
  std::vector<unsigned char> A(s.heads * bytes_of(wide));
  for (int64_t h = 0; h < s.heads; ++h) {
    const double rate = -0.5;
    const float single = -0.5f;
    std::memcpy(A.data() + h * bytes_of(wide), wide == Storage::f64 ? static_cast<const void*>(&rate) : &single,
                bytes_of(wide));
  }

  SsdForward f;
  f.storage = storage;
  f.seqlen = s.seqlen, f.heads = s.heads, f.groups = s.groups, f.headdim = s.headdim, f.dstate = s.dstate;
  f.rows = rows, f.most_chunks = plan.most_chunks, f.chunk_tokens = plan.chunk_tokens;
  f.row = plan.rows.data(), f.chunk = plan.chunks.data();
  f.direction = reverse ? -1 : 1, f.batch_tokens = s.seqlen;
  f.head_blocks = blocks;
  const std::vector<int64_t> order = shuffled(s.seqlen);
  if (ordered) f.order = order.data();
  f.x = dense(x.data(), s.seqlen, s.heads, s.headdim);
  f.B = dense(B.data(), s.seqlen, s.groups, s.dstate), f.C = dense(C.data(), s.seqlen, s.groups, s.dstate);
  f.dt = dense(dt.data(), s.seqlen, s.heads, 1);
  if (everything) f.z = dense(z.data(), s.seqlen, s.heads, s.headdim);
  f.A = A.data(), f.D = everything ? D.data() : nullptr, f.dt_bias = everything ? bias.data() : nullptr;
  f.D_per_channel = everything, f.softplus = everything, f.dt_low = 0, f.dt_high = 1.5;
  f.initial = everything ? initial.data() : nullptr;
  auto y = unwritten(storage, by_head), plain = unwritten(wide, by_head), final = unwritten(wide, by_state);
  f.y = y.data(), f.y_arithmetic = false, f.final = everything ? final.data() : nullptr;
  ssd_fwd(f);
  require_numbers("y", storage, y);
  if (everything) require_numbers("final", wide, final);
  f.z = SsdIn{}, f.y = plain.data(), f.y_arithmetic = storage != wide, f.final = nullptr;
  ssd_fwd(f);
  require_numbers("y before the gate", wide, plain);

  SsdBackward b;
  static_cast<Ssd&>(b) = f;
  if (everything) b.z = dense(z.data(), s.seqlen, s.heads, s.headdim);
  b.grad_y = dense(grad.data(), s.seqlen, s.heads, s.headdim);
  b.grad_final = everything ? initial.data() : nullptr;
  b.y = plain.data();
  auto grad_x = unwritten(storage, by_head), grad_z = grad_x, grad_dt = unwritten(wide, tokens * s.heads);
  auto grad_B = unwritten(blocks == 1 ? storage : wide, blocks * by_group), grad_C = grad_B;
  auto grad_initial = unwritten(wide, by_state), sums = unwritten(Storage::f64, rows * s.heads * (s.headdim + 2));
  b.grad_x = grad_x.data(), b.grad_z = grad_z.data(), b.grad_dt = grad_dt.data();
  b.grad_B = grad_B.data(), b.grad_C = grad_C.data(), b.block_stride = by_group;
  b.grad_initial = everything ? grad_initial.data() : nullptr;
  b.grad_A = reinterpret_cast<double*>(sums.data());
  b.grad_dt_bias = b.grad_A + rows * s.heads, b.grad_D = b.grad_dt_bias + rows * s.heads;
  ssd_bwd(b);
  require_numbers("grad_x", storage, grad_x);
  if (everything) require_numbers("grad_z", storage, grad_z), require_numbers("grad_initial", wide, grad_initial);
  require_numbers("grad_dt", wide, grad_dt);
  require_numbers("sums over tokens", Storage::f64, sums);
  for (const auto* part : {&grad_B, &grad_C}) {
    require_numbers("grad_B, grad_C", blocks == 1 ? storage : wide, *part);
    if (blocks == 1) continue;
    auto total = unwritten(storage, by_group);
    ssd_sum_blocks({storage, blocks, by_group, part->data(), total.data()});
    require_numbers("grad_B, grad_C summed", storage, total);
  }
}

// The forward that convolves x as it reads it, along an order.
void convolved(Storage storage, const Sizes& s, int64_t width, bool bias) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const SsdPlan plan = plan_of(s, Packing::none, false, false);
  const int64_t tokens = s.batch * s.seqlen, channels = s.heads * s.headdim;
  const auto x = values(storage, tokens * channels), B = values(storage, tokens * s.groups * s.dstate), C = B;
  const auto dt = values(wide, tokens * s.heads);
  std::vector<unsigned char> rates(s.heads * bytes_of(wide));  // zeros: nothing is forgotten
  const auto taps = values(wide, width * channels), biases = values(wide, channels);
  const std::vector<int64_t> order = shuffled(s.seqlen);
  SsdForward f;
  f.storage = storage;
  f.seqlen = s.seqlen, f.heads = s.heads, f.groups = s.groups, f.headdim = s.headdim, f.dstate = s.dstate;
  f.rows = static_cast<int64_t>(plan.rows.size()), f.most_chunks = plan.most_chunks;
  f.chunk_tokens = plan.chunk_tokens;
  f.row = plan.rows.data(), f.chunk = plan.chunks.data();
  f.direction = 1, f.batch_tokens = s.seqlen, f.head_blocks = 1;
  f.order = order.data();
  f.x = dense(x.data(), s.seqlen, s.heads, s.headdim);
  f.B = dense(B.data(), s.seqlen, s.groups, s.dstate), f.C = dense(C.data(), s.seqlen, s.groups, s.dstate);
  f.dt = dense(dt.data(), s.seqlen, s.heads, 1);
  f.A = rates.data(), f.D = nullptr, f.dt_bias = nullptr;
  f.D_per_channel = false, f.softplus = true, f.dt_low = 0, f.dt_high = 1e-3;
  f.initial = nullptr, f.final = nullptr;
  f.conv.width = width, f.conv.channels = channels, f.conv.silu = true;
  f.conv.taps = taps.data(), f.conv.bias = bias ? biases.data() : nullptr;
  auto y = unwritten(storage, tokens * channels);
  f.y = y.data(), f.y_arithmetic = false;
  ssd_fwd(f);
  require_numbers("y of a convolved scan", storage, y);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    for (bool reverse : {false, true}) {
      scan(storage, {2, 1, 1, 1, 1, 1}, Packing::none, reverse, true, 1);
      scan(storage, {2, 19, 2, 1, 3, 5}, Packing::none, reverse, false, 1);
      scan(storage, {1, 70, 5, 1, 17, 33}, Packing::none, reverse, true, 3);
      scan(storage, {1, 130, 4, 2, 16, 8}, Packing::offsets, reverse, true, 1);
      scan(storage, {2, 41, 3, 3, 7, 16}, Packing::ids, reverse, true, 1);
    }
    scan(storage, {2, 41, 3, 3, 7, 16}, Packing::none, false, true, 1, true);
    scan(storage, {1, 150, 2, 1, 17, 9}, Packing::none, false, false, 2, true);
    for (int64_t width : {1, 2, 4, 7}) {
      convolved(storage, {2, 3, 2, 1, 5, 3}, width, false);
      convolved(storage, {1, 150, 2, 2, 17, 9}, width, true);
    }
  }
  std::puts("ok");
  return 0;
}
