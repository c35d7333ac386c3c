// The torch side of scans of a grid: the state-space scan of csrc/cpu/ssd_*.cpp once for each direction, reading and
// writing tokens where an order says.  No tensor is permuted; x, B, C and dt may be expanded over the directions.
#include <cstring>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/causal_conv1d.h"
#include "ops/scan_orders.h"
#include "ops/ssd_call.h"

namespace mmkernels {

namespace {

using namespace ssd_call;

// The inputs of direction k.
Inputs direction(int64_t k, const Orders& orders, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                 const Tensor& C, const MaybeTensor& D, const MaybeTensor& dt_bias, const Options& options) {
  const auto of = [&](const Tensor& tensor, int64_t dim) { return torch::stable::select(tensor, dim, k); };
  const auto maybe = [&](const MaybeTensor& tensor) { return tensor ? MaybeTensor(of(*tensor, 0)) : MaybeTensor(); };
  Inputs inputs(of(x, 1), of(dt, 1), of(A, 0), of(B, 1), of(C, 1), maybe(D), {}, maybe(dt_bias), {}, {}, {}, options);
  inputs.order = orders[k];
  inputs.scans = orders.count;
  return inputs;
}

void check_directions(const Orders& orders, const Tensor& x, const Tensor& dt, const Tensor& B, const Tensor& C) {
  STD_TORCH_CHECK(x.dim() == 5 && dt.dim() == 4 && B.dim() == 5 && C.dim() == 5 && orders.length == x.size(2),
                  "ssd_scan_2d: x, dt, B and C must be (batch, scans, seqlen, ...), orders (scans, seqlen)");
  for (const Tensor* tensor : {&x, &dt, &B, &C}) {
    STD_TORCH_CHECK(tensor->size(1) == orders.count, "ssd_scan_2d: every tensor must have one slice a scan");
  }
}

Tensor forward(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
               const MaybeTensor& D, const MaybeTensor& dt_bias, const Tensor& orders_, bool dt_softplus, double dt_low,
               double dt_high, int64_t chunk_size) {
  const Orders orders("ssd_scan_2d", orders_);
  check_directions(orders, x, dt, B, C);
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, false};
  Tensor y = empty(sizes_of(x), x.scalar_type());
  for (int64_t k = 0; k < orders.count; ++k) {
    const Inputs inputs = direction(k, orders, x, dt, A, B, C, D, dt_bias, options);
    run_forward(inputs, false, torch::stable::select(y, 1, k).mutable_data_ptr(), false, nullptr);
  }
  return y;
}

// ---- with the convolution before it, for inference: x is convolved as the scan reads it, B and C into a small buffer ----

// silu(conv) of the last channels of one direction of xBC, those of B and C, into the same buffer for every direction.
struct KeyConvolution {
  std::vector<ConvPiece> pieces;
  ScalarType arithmetic;
  int64_t first;  // channel
  Tensor out;

  KeyConvolution(int64_t batch, int64_t seqlen, int64_t first_, int64_t channels, const Tensor& xBC)
      : arithmetic(arithmetic_of(storage_of(xBC, "xBC"))), first(first_),
        out(empty({batch, seqlen, channels}, xBC.scalar_type())) {
    for (int64_t row = 0; row < batch; ++row) {
      for (int64_t begin = 0; begin < seqlen; begin += kConvPieceTokens) {
        const int64_t end = begin + kConvPieceTokens < seqlen ? begin + kConvPieceTokens : seqlen;
        pieces.push_back({row, 0, seqlen, begin, end, -1, -1, false});
      }
    }
  }

  void run(const Tensor& xBC, const SsdConvolution& conv, const int64_t* order) {
    const int64_t stored = static_cast<int64_t>(out.element_size()), wide = arithmetic == ScalarType::Double ? 8 : 4;
    const auto from = [](const void* data, int64_t bytes) {
      return data == nullptr ? nullptr : static_cast<const char*>(data) + bytes;
    };
    CausalConv1dForward call;
    call.storage = storage_of(xBC, "xBC");
    call.dim = out.size(2), call.width = conv.width, call.step = 1, call.order = order;
    call.pieces = pieces.data(), call.piece_count = static_cast<int64_t>(pieces.size());
    call.silu = conv.silu;
    call.x = {from(xBC.const_data_ptr(), first * stored), xBC.stride(0), xBC.stride(1)};
    // A kernel's rows of taps are as wide as its rows of channels.
    const int64_t row = call.dim * wide;
    std::vector<char> taps(static_cast<size_t>(conv.width * row));
    for (int64_t k = 0; k < conv.width; ++k) {
      std::memcpy(taps.data() + k * row, from(conv.taps, (k * conv.channels + first) * wide), static_cast<size_t>(row));
    }
    call.taps = taps.data(), call.bias = from(conv.bias, first * wide);
    call.y = {out.mutable_data_ptr(), out.stride(0), out.stride(1)};
    causal_conv1d_fwd(call);
  }
};

Tensor convolved(const Tensor& xBC, const Tensor& dt, const Tensor& weight, const MaybeTensor& bias, const Tensor& A,
                 const MaybeTensor& D, const MaybeTensor& dt_bias, const Tensor& orders_, int64_t headdim,
                 int64_t groups, bool silu, bool dt_softplus, double dt_low, double dt_high, int64_t chunk_size) {
  const Orders orders("conv_ssd_scan_2d", orders_);
  STD_TORCH_CHECK(xBC.dim() == 4 && xBC.size(1) == orders.count && xBC.size(2) == orders.length && weight.dim() == 3,
                  "conv_ssd_scan_2d: xBC must be (batch, scans, seqlen, conv_dim), orders (scans, seqlen)");
  const int64_t batch = xBC.size(0), seqlen = xBC.size(2), conv_dim = xBC.size(3), heads = A.size(1);
  const int64_t inner = heads * headdim, keys = (conv_dim - inner) / 2, dstate = groups > 0 ? keys / groups : 0;
  STD_TORCH_CHECK(keys >= 0 && inner + 2 * groups * dstate == conv_dim && weight.size(0) == orders.count &&
                      weight.size(1) == conv_dim && weight.size(2) >= 1 && dt.dim() == 4 && dt.size(1) == orders.count,
                  "conv_ssd_scan_2d: the channels of xBC must be those of x, B and C, and of the filters");
  STD_TORCH_CHECK(!bias || (bias->size(0) == orders.count && bias->size(1) == conv_dim),
                  "conv_ssd_scan_2d: conv_bias must be (scans, conv_dim)");
  const Tensor dense = dense_last(xBC);
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, false};
  Tensor y = empty({batch, orders.count, seqlen, heads, headdim}, xBC.scalar_type());
  KeyConvolution key_conv(batch, seqlen, inner, 2 * keys, xBC);
  const auto of = [](const Tensor& tensor, int64_t dim, int64_t k) { return torch::stable::select(tensor, dim, k); };
  const auto maybe = [&](const MaybeTensor& tensor, int64_t k) { return tensor ? MaybeTensor(of(*tensor, 0, k)) : MaybeTensor(); };
  for (int64_t k = 0; k < orders.count; ++k) {
    Tensor one = of(dense, 1, k), filters = of(weight, 0, k);
    const Tensor taps = parameter_of(torch::stable::transpose(filters, 0, 1), key_conv.arithmetic);
    const MaybeTensor offsets = bias ? MaybeTensor(parameter_of(of(*bias, 0, k), key_conv.arithmetic)) : MaybeTensor();
    const SsdConvolution conv{weight.size(2), conv_dim, taps.const_data_ptr(),
                              offsets ? offsets->const_data_ptr() : nullptr, silu};
    key_conv.run(one, conv, orders[k]);
    const auto part = [&](Tensor& tensor, int64_t first, int64_t count, int64_t size) {
      return torch::stable::view(torch::stable::narrow(tensor, 2, first, count * size), {batch, seqlen, count, size});
    };
    Inputs inputs(part(one, 0, heads, headdim), of(dt, 1, k), of(A, 0, k), part(key_conv.out, 0, groups, dstate),
                  part(key_conv.out, keys, groups, dstate), maybe(D, k), {}, maybe(dt_bias, k), {}, {}, {}, options);
    inputs.order = orders[k], inputs.scans = orders.count, inputs.conv = conv;
    run_forward(inputs, false, of(y, 1, k).mutable_data_ptr(), false, nullptr);
  }
  return y;
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors backward(const Tensor& grad_y, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                      const Tensor& C, const MaybeTensor& D, const MaybeTensor& dt_bias, const Tensor& orders_,
                      bool dt_softplus, double dt_low, double dt_high, int64_t chunk_size) {
  const Orders orders("ssd_scan_2d", orders_);
  check_directions(orders, x, dt, B, C);
  check_same(grad_y, x, "grad_y");
  const Options options{dt_softplus, dt_low, dt_high, chunk_size, false};
  const Inputs first = direction(0, orders, x, dt, A, B, C, D, dt_bias, options);
  Gradients gradients(first, true);
  const auto parameter = [&](const MaybeTensor& tensor) {
    return empty(tensor ? sizes_of(*tensor) : std::vector<int64_t>{0}, first.arithmetic);
  };
  Tensor grad_A = parameter(A), grad_D = parameter(D), grad_bias = parameter(dt_bias);
  for (int64_t k = 0; k < orders.count; ++k) {
    const Inputs inputs = direction(k, orders, x, dt, A, B, C, D, dt_bias, options);
    const Tensor grad = dense_last(torch::stable::select(grad_y, 1, k));
    SsdBackward call;
    inputs.fill(call);
    gradients.fill(call, k);
    call.grad_y = in_of(grad);
    call.grad_final = call.y = nullptr;
    ssd_bwd(call);
    const auto keep = [&](const Tensor& all, const Tensor& sum) {
      Tensor row = torch::stable::select(all, 0, k);
      torch::stable::copy_(row, sum);
    };
    keep(grad_A, gradients.sum_A());
    if (D) keep(grad_D, gradients.sum_D());
    if (dt_bias) keep(grad_bias, gradients.sum_dt_bias());
  }
  gradients.sum_blocks();
  return {gradients.x, gradients.dt, grad_A, gradients.B, gradients.C, grad_D, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("ssd_scan_2d", TORCH_BOX(&forward));
  m.impl("conv_ssd_scan_2d", TORCH_BOX(&convolved));
  m.impl("ssd_scan_2d_fwd", TORCH_BOX(&forward));
  m.impl("ssd_scan_2d_bwd", TORCH_BOX(&backward));
}

}  // namespace mmkernels
