// The attention kernels without torch (alone.h): every storage type, masks of every kind, sizes around the tiles; and
// but for float16 against the formula with plain loops, so that a planted fault shows by the name of what it spoils.
#include <cmath>
#include <random>

#include "alone.h"
#include "cpu/mma_attention.h"
#include "cpu/mma_attention_plan.h"

namespace {

struct Sizes {
  int64_t batch, qlen, klen, heads, kv_heads, headdim;
  int64_t queries() const { return batch * qlen * heads * headdim; }
  int64_t keys() const { return batch * klen * kv_heads * headdim; }
  int64_t rows() const { return batch * heads * qlen; }
};

struct MaskOf {
  std::vector<int32_t> start, end;
  std::vector<AttentionRect> rects;
  std::vector<int64_t> before;

  // Causal with the last row on the last key, a rectangle above the diagonal and one that overlaps; some rows empty.
  explicit MaskOf(const Sizes& s) : start(s.batch * s.qlen), end(s.batch * s.qlen), before(s.batch + 1) {
    for (int64_t r = 0; r < s.batch * s.qlen; ++r) {
      const int64_t i = r % s.qlen;
      start[r] = static_cast<int32_t>(i % 11 == 3 ? i / 2 : 0);
      end[r] = static_cast<int32_t>(i % 23 == 5 ? 0 : s.klen - s.qlen + i + 1);
    }
    const auto part = [](int64_t whole, int64_t eighths) { return static_cast<int32_t>(whole * eighths / 8); };
    for (int32_t b = 0; b < s.batch; ++b) {
      before[b] = static_cast<int64_t>(rects.size());
      rects.push_back({b, part(s.qlen, 1), part(s.qlen, 4), part(s.klen, 5), part(s.klen, 7)});
      rects.push_back({b, part(s.qlen, 2), part(s.qlen, 5), part(s.klen, 2), part(s.klen, 6)});
    }
    before[s.batch] = static_cast<int64_t>(rects.size());
  }

  bool keeps(const Sizes& s, int64_t b, int64_t i, int64_t j) const {
    if (start[b * s.qlen + i] <= j && j < end[b * s.qlen + i]) return true;
    for (int64_t n = before[b]; n < before[b + 1]; ++n) {
      const AttentionRect& r = rects[n];
      if (r.q0 <= i && i < r.q1 && r.k0 <= j && j < r.k1) return true;
    }
    return false;
  }
};

// Whether the formula is compared with.
bool compared(Storage storage) { return storage != Storage::f16; }

double read(Storage storage, const std::vector<unsigned char>& memory, int64_t i) {
  double wide;
  float single;
  uint16_t brain;
  if (storage == Storage::f64) return std::memcpy(&wide, memory.data() + 8 * i, 8), wide;
  if (storage == Storage::bf16) {
    std::memcpy(&brain, memory.data() + 2 * i, 2);
    const uint32_t word = static_cast<uint32_t>(brain) << 16;
    return std::memcpy(&single, &word, 4), single;
  }
  return std::memcpy(&single, memory.data() + 4 * i, 4), single;
}

// Normal numbers, or those of alone.h in float16.
std::vector<unsigned char> normal(Storage storage, int64_t n, unsigned seed) {
  if (!compared(storage)) return values(storage, n);
  std::vector<unsigned char> memory(n * bytes_of(storage));
  std::mt19937 bits(seed);
  for (int64_t i = 0; i < n; ++i) {
    double wide = -6;  // a sum of twelve uniform numbers, the same with every standard library
    for (int k = 0; k < 12; ++k) wide += static_cast<double>(bits()) / 4294967296.0;
    const float single = static_cast<float>(wide);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    const uint16_t brain = static_cast<uint16_t>(word >> 16);
    const void* source = storage == Storage::f64   ? static_cast<const void*>(&wide)
                         : storage == Storage::f32 ? static_cast<const void*>(&single)
                                                   : &brain;
    std::memcpy(memory.data() + i * bytes_of(storage), source, bytes_of(storage));
  }
  return memory;
}

AttentionIn dense(const std::vector<unsigned char>& memory, int64_t tokens, int64_t heads, int64_t headdim) {
  return {memory.data(), tokens * heads * headdim, heads * headdim, headdim};
}

void require_close(const char* what, Storage storage, const std::vector<unsigned char>& got,
                   const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double value = read(storage, got, static_cast<int64_t>(i));
    if (std::isinf(want[i]) && value == want[i]) continue;
    error += (value - want[i]) * (value - want[i]), norm += want[i] * want[i];
  }
  // Rounding makes some 1e-7 (1e-16, 2e-3) of the norm; every planted fault more than ten times the limit.
  const double limit = storage == Storage::f64 ? 1e-12 : storage == Storage::f32 ? 4e-6 : 6e-3;
  if (std::sqrt(error) <= limit * std::sqrt(norm)) return;
  std::printf("%s: wrong by %g of its norm\n", what, std::sqrt(error / norm));
  std::exit(1);
}

// Everything the kernels compute, by definition.
struct Truth {
  std::vector<double> out, lse, mass, grad_q, grad_k, grad_v;

  template <class Value>
  Truth(const Sizes& s, const MaskOf& mask, double scale, const Value& at)
      : out(s.queries()), lse(s.rows()), mass(s.batch * s.heads * s.klen), grad_q(out), grad_k(s.keys()),
        grad_v(s.keys()) {
    const int64_t group = s.heads / s.kv_heads;
    std::vector<double> p(s.klen), dp(s.klen);
    for (int64_t row = 0; row < s.rows(); ++row) {
      const int64_t i = row % s.qlen, h = row / s.qlen % s.heads, b = row / s.qlen / s.heads;
      const auto of_q = [&](int64_t d) { return ((b * s.qlen + i) * s.heads + h) * s.headdim + d; };
      const auto of_k = [&](int64_t j, int64_t d) {
        return ((b * s.klen + j) * s.kv_heads + h / group) * s.headdim + d;
      };
      double total = 0, inner = -at('e', row);
      for (int64_t j = 0; j < s.klen; ++j) {
        double score = 0;
        dp[j] = 0;
        for (int64_t d = 0; d < s.headdim; ++d) {
          score += at('q', of_q(d)) * at('k', of_k(j, d)), dp[j] += at('g', of_q(d)) * at('v', of_k(j, d));
        }
        p[j] = mask.keeps(s, b, i, j) ? std::exp(score * scale) : 0;
        total += p[j];
      }
      lse[row] = std::log(total);
      for (int64_t j = 0; j < s.klen && total > 0; ++j) {
        p[j] /= total;
        inner += p[j] * dp[j];
        mass[(b * s.heads + h) * s.klen + j] += at('w', b * s.qlen + i) * p[j];
      }
      for (int64_t j = 0; j < s.klen; ++j) {
        const double ds = p[j] * (dp[j] - inner);
        for (int64_t d = 0; d < s.headdim; ++d) {
          out[of_q(d)] += p[j] * at('v', of_k(j, d)), grad_v[of_k(j, d)] += p[j] * at('g', of_q(d));
          grad_q[of_q(d)] += scale * ds * at('k', of_k(j, d)), grad_k[of_k(j, d)] += scale * ds * at('q', of_q(d));
        }
      }
    }
  }
};

void attend(Storage storage, const Sizes& s, bool few, int64_t chunk_rows, int64_t heads_together, int64_t splits) {
  const Storage wide = storage == Storage::f64 ? Storage::f64 : Storage::f32;
  const MaskOf mask(s);
  const auto q = normal(storage, s.queries(), 1), k = normal(storage, s.keys(), 2), v = normal(storage, s.keys(), 3);
  const auto grad = normal(storage, s.queries(), 4), grad_lse = normal(wide, s.rows(), 5);
  const auto weights = normal(wide, s.batch * s.qlen, 6);

  AttentionForward f{};
  f.storage = storage, f.batch = s.batch, f.qlen = s.qlen, f.klen = s.klen;
  f.heads = s.heads, f.kv_heads = s.kv_heads, f.headdim = s.headdim;
  f.q = dense(q, s.qlen, s.heads, s.headdim);
  f.k = dense(k, s.klen, s.kv_heads, s.headdim), f.v = dense(v, s.klen, s.kv_heads, s.headdim);
  f.row_start = mask.start.data(), f.row_end = mask.end.data();
  f.rects = mask.rects.data(), f.rects_before = mask.before.data();
  f.scale = 1 / std::sqrt(static_cast<double>(s.headdim));
  const int64_t split_keys = (s.klen / splits + 63) / 64 * 64;
  f.splits = (s.klen + split_keys - 1) / split_keys;
  const AttentionPlan plan(f, chunk_rows, heads_together, f.splits, split_keys, 3);
  plan.fill(f);
  auto out = unwritten(storage, s.queries()), lse = unwritten(wide, s.rows());
  auto parts = unwritten(wide, f.splits * s.queries()), part_lse = unwritten(wide, f.splits * s.rows());
  f.out = out.data(), f.lse = lse.data(), f.parts = parts.data(), f.part_lse = part_lse.data();
  few ? mma_attention_few(f) : mma_attention_fwd(f);
  if (f.splits > 1) mma_attention_join(f);
  require_numbers("out", storage, out), require_numbers("lse", wide, lse);

  const int64_t group_rows = s.heads / s.kv_heads * s.qlen;
  AttentionMass m{};
  static_cast<Attention&>(m) = f;
  const AttentionPlan by_keys(m, group_rows, 1, (s.klen + 127) / 128, 128, 2);
  by_keys.fill(m);
  auto mass = unwritten(wide, s.batch * s.heads * s.klen);
  m.lse = lse.data(), m.weights = weights.data(), m.mass = mass.data();
  mma_attention_mass(m);
  require_numbers("mass", wide, mass);

  AttentionBackward b{};
  static_cast<Attention&>(b) = f;
  const AttentionPlan whole(b, group_rows, 1, 1, s.klen, 2);
  whole.fill(b);
  b.grad_out = dense(grad, s.qlen, s.heads, s.headdim), b.out = dense(out, s.qlen, s.heads, s.headdim);
  b.lse = lse.data(), b.grad_lse = grad_lse.data();
  auto grad_q = unwritten(storage, s.queries()), grad_k = unwritten(storage, s.keys()), grad_v = grad_k;
  b.grad_q = grad_q.data(), b.grad_k = grad_k.data(), b.grad_v = grad_v.data();
  mma_attention_bwd(b);
  require_numbers("grad_q", storage, grad_q), require_numbers("grad_k", storage, grad_k);
  require_numbers("grad_v", storage, grad_v);

  if (!compared(storage)) return;
  const Truth truth(s, mask, f.scale, [&](char name, int64_t i) {
    return name == 'q'   ? read(storage, q, i)
           : name == 'k' ? read(storage, k, i)
           : name == 'v' ? read(storage, v, i)
           : name == 'g' ? read(storage, grad, i)
           : name == 'w' ? read(wide, weights, i)
                         : read(wide, grad_lse, i);
  });
  require_close(few ? "out of few" : f.splits > 1 ? "out of stretches" : "out", storage, out, truth.out);
  require_close("lse", wide, lse, truth.lse), require_close("mass", wide, mass, truth.mass);
  require_close("grad_q", storage, grad_q, truth.grad_q), require_close("grad_k", storage, grad_k, truth.grad_k);
  require_close("grad_v", storage, grad_v, truth.grad_v);
}

}  // namespace

int main(int, char** arguments) {
  use_level(arguments[1]);
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16, Storage::f64}) {
    attend(storage, {1, 1, 1, 1, 1, 1}, false, 96, 1, 1);
    attend(storage, {2, 130, 130, 2, 2, 17}, false, 96, 1, 1);
    attend(storage, {1, 50, 171, 4, 2, 72}, false, 192, 1, 1);  // tiles of rows of two heads
    attend(storage, {1, 40, 600, 3, 1, 5}, false, 96, 1, 3);
    attend(storage, {2, 1, 200, 6, 2, 64}, true, 3, 2, 2);
    attend(storage, {1, 3, 150, 5, 1, 37}, true, 15, 1, 1);
  }
  std::puts("ok");
  return 0;
}
