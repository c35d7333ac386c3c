// Every native op: its schema.  Implementations are registered where they are defined, in csrc/ops/<op>.cpp; the fake
// kernels and the gradients are Python, in mmkernels/ops/<op>/_native.py.
//
// An output that a call does not want, or that belongs to an input it was not given, is an empty tensor.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"
#include "common/view.h"

STABLE_TORCH_LIBRARY(mmkernels, m) {
  // Three of each: for inference, for training (with what the backward reads), and the backward.
  m.def(
      "gated_rms_norm(Tensor x, Tensor weight, Tensor? z, Tensor? bias, float eps, int group_size, "
      "bool norm_before_gate) -> Tensor");
  m.def(
      "gated_rms_norm_fwd(Tensor x, Tensor weight, Tensor? z, Tensor? bias, float eps, int group_size, "
      "bool norm_before_gate) -> (Tensor y, Tensor rstd)");
  m.def(
      "gated_rms_norm_bwd(Tensor grad_y, Tensor x, Tensor weight, Tensor? z, Tensor? bias, Tensor rstd, "
      "float eps, int group_size, bool norm_before_gate, bool parameter_gradients) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_z, Tensor grad_bias)");

  // The scan saves its inputs only, so that training differs from inference in nothing but autograd.
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_low, float dt_high, "
      "int chunk_size, bool reverse, bool return_final_states) -> (Tensor y, Tensor final_states)");
  m.def(
      "ssd_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_low, float dt_high, "
      "int chunk_size, bool reverse, bool return_final_states) -> (Tensor y, Tensor final_states)");
  m.def(
      "ssd_scan_bwd(Tensor grad_y, Tensor? grad_final, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, "
      "float dt_low, float dt_high, int chunk_size, bool reverse) "
      "-> (Tensor grad_x, Tensor grad_dt, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z, "
      "Tensor grad_dt_bias, Tensor grad_initial_states)");

  // Several scans of a grid, tensors (batch, scans, seqlen, ...), orders (scans, seqlen): the token each step reads.
  m.def(
      "ssd_scan_2d(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor orders, "
      "bool dt_softplus, float dt_low, float dt_high, int chunk_size) -> Tensor");
  m.def(
      "ssd_scan_2d_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor orders, "
      "bool dt_softplus, float dt_low, float dt_high, int chunk_size) -> Tensor");
  m.def(
      "ssd_scan_2d_bwd(Tensor grad_y, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
      "Tensor orders, bool dt_softplus, float dt_low, float dt_high, int chunk_size) -> (Tensor grad_x, Tensor grad_dt, "
      "Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_dt_bias)");
  m.def(
      "conv_ssd_scan_2d(Tensor xBC, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor? D, "
      "Tensor? dt_bias, Tensor orders, int headdim, int ngroups, bool silu, bool dt_softplus, float dt_low, "
      "float dt_high, int chunk_size) -> Tensor");
  m.def(
      "causal_conv1d_2d(Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu) -> Tensor");
  m.def(
      "causal_conv1d_2d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu) -> Tensor");
  m.def(
      "causal_conv1d_2d_bwd(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "merged_gated_rms_norm(Tensor y, Tensor weight, Tensor? z, float eps, int group_size, bool mean) -> Tensor");
  m.def(
      "merged_gated_rms_norm_fwd(Tensor y, Tensor weight, Tensor? z, float eps, int group_size, bool mean) "
      "-> (Tensor out, Tensor rstd)");
  m.def(
      "merged_gated_rms_norm_bwd(Tensor grad_out, Tensor y, Tensor weight, Tensor? z, Tensor rstd, float eps, "
      "int group_size, bool mean) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_z)");

  // Attention over an interval of keys per row, and rectangles (batch, q0, q1, k0, k1).
  m.def(
      "mma_attention(Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor row_end, Tensor rects, "
      "Tensor? mass_weights, float scale) -> (Tensor out, Tensor lse, Tensor mass)");
  m.def(
      "mma_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor row_start, Tensor row_end, Tensor rects, "
      "Tensor? mass_weights, float scale) -> (Tensor out, Tensor lse, Tensor mass)");
  m.def(
      "mma_attention_bwd(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor row_start, "
      "Tensor row_end, Tensor rects, Tensor out, Tensor lse, float scale) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");

  // The convolution, and its step in place.
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, "
      "Tensor? cu_seqlens, bool silu, bool reverse, bool return_final_states) -> (Tensor y, Tensor final_states)");
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, "
      "Tensor? cu_seqlens, bool silu, bool reverse, bool return_final_states) -> (Tensor y, Tensor final_states)");
  m.def(
      "causal_conv1d_bwd(Tensor grad_y, Tensor? grad_final, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, bool silu, bool reverse, "
      "bool parameter_gradients) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_states)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, bool silu=True, "
      "Tensor? state_indices=None) -> Tensor");
  // The defaults are what a decode step passes: an argument left out costs a tenth of one that is None, True or a
  // number.  (A negative dt_high is no limit.)
  m.def(
      "ssd_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? dt_bias=None, bool dt_softplus=True, Tensor? z=None, Tensor? state_indices=None, float dt_low=0.0, "
      "float dt_high=-1.0) -> Tensor");

  // A few rows times a large matrix; its gradients are plain products.
  m.def("decode_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("decode_linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

  // Scores of visual tokens, and the choice among them; counts is how many each sample keeps (absent: width), total < 0
  // asks for padded outputs of that width, else it is the length of packed ones.
  m.def("cls_attention_scores(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, float weight) -> Tensor");
  m.def("cls_attention_scores_fwd(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, float weight) -> Tensor");
  m.def(
      "attention_column_scores(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, Tensor? query_mask, "
      "Tensor? key_mask, bool causal) -> Tensor");
  m.def(
      "attention_column_scores_fwd(Tensor q, Tensor k, Tensor? lse, float scale, int num_prefix, Tensor? query_mask, "
      "Tensor? key_mask, bool causal) -> Tensor");
  m.def(
      "prune_tokens(Tensor features, Tensor scores, Tensor? mask, Tensor? position_ids, Tensor? counts, int width, "
      "int total) -> (Tensor tokens, Tensor keep_indices, Tensor position_ids, Tensor mask, Tensor cu_seqlens)");
  m.def(
      "prune_tokens_fwd(Tensor features, Tensor scores, Tensor? mask, Tensor? position_ids, Tensor? counts, int width, "
      "int total) -> (Tensor tokens, Tensor keep_indices, Tensor position_ids, Tensor mask, Tensor cu_seqlens)");

  // Which tokens are alike, and their means: a plan (keep_indices, assignment, source) and what it makes of x.
  m.def(
      "bipartite_soft_matching(Tensor metric, int r, int protect, bool sets) "
      "-> (Tensor keep_indices, Tensor assignment, Tensor source, Tensor similarity)");
  m.def(
      "bipartite_soft_matching_fwd(Tensor metric, int r, int protect, bool sets) "
      "-> (Tensor keep_indices, Tensor assignment, Tensor source, Tensor similarity)");
  m.def(
      "merge_tokens(Tensor x, Tensor keep_indices, Tensor assignment, Tensor source, Tensor? sizes) "
      "-> (Tensor tokens, Tensor totals)");
  m.def(
      "merge_tokens_fwd(Tensor x, Tensor keep_indices, Tensor assignment, Tensor source, Tensor? sizes) "
      "-> (Tensor tokens, Tensor totals)");
  m.def(
      "merge_tokens_bwd(Tensor grad_tokens, Tensor grad_totals, Tensor x, Tensor keep_indices, Tensor assignment, "
      "Tensor source, Tensor? sizes, Tensor totals) -> (Tensor grad_x, Tensor grad_sizes)");

  // One token of a whole block; an empty residual sum where there is no norm_weight.
  m.def(
      "mamba2_step(Tensor hidden, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor in_weight, Tensor conv_weight, "
      "Tensor A_log, Tensor dt_bias, Tensor D, Tensor out_weight, Tensor? residual, Tensor? norm_weight, "
      "Tensor? in_bias, Tensor? conv_bias, Tensor? gate_weight, Tensor? out_bias, float eps, float gate_eps, "
      "float dt_low, float dt_high, bool norm_before_gate, bool residual_in_fp32) -> (Tensor out, Tensor residual_sum)");

  // The same through a row of blocks, one after the other: kParameters tensors and kNumbers numbers of each.
  m.def(
      "mamba2_steps(Tensor hidden, Tensor? residual, Tensor(a!)[] conv_states, Tensor(b!)[] ssm_states, "
      "Tensor?[] parameters, float[] numbers) -> (Tensor out, Tensor residual_sum)");

  // The instruction set in use, the best this CPU has, and a way for tests to lower it.
  m.def("isa() -> str");
  m.def("best_isa() -> str");
  m.def("runs_isa(str level) -> bool");
  m.def("set_isa(str level) -> ()");

  // From now on, whether outputs are full of NaN before they are written (for tests); returns whether they were.
  m.def("poison(bool on) -> bool");
}

namespace {

std::string isa() { return mmkernels::kIsaNames[static_cast<int>(mmkernels::current_isa())]; }
std::string best_isa() { return mmkernels::kIsaNames[static_cast<int>(mmkernels::best_isa())]; }

mmkernels::Isa isa_named(const std::string& level) {
  for (int i = 0; i < mmkernels::kIsaCount; ++i) {
    if (level == mmkernels::kIsaNames[i]) return static_cast<mmkernels::Isa>(i);
  }
  STD_TORCH_CHECK(false, "level must be baseline, avx2, avx512 or avx512_bf16; got ", level);
}

bool runs_isa(std::string level) { return mmkernels::runs_isa(isa_named(level)); }

void set_isa(std::string level) {
  STD_TORCH_CHECK(mmkernels::set_isa(isa_named(level)), "this CPU cannot run ", level);
}

bool poison(bool on) { return mmkernels::poisoning().exchange(on); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("best_isa", TORCH_BOX(&best_isa));
  m.impl("runs_isa", TORCH_BOX(&runs_isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("poison", TORCH_BOX(&poison));
}
