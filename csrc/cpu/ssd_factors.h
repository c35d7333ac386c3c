// Factors of the products with a state in the backward of the state-space scan, as numbers or as pairs.
#pragma once

#include "cpu/ssd_chunk.h"

namespace mmkernels::MMK_ISA_NS {
namespace {

// What the large products of a chunk multiply: those with a state, six of eight.  The products of pairs of tokens stay in
// numbers, because every one of them counts in the gradients of all steps between the two tokens.
template <class E>
struct StateFactors {
  using A = typename Factor<E>::Sum;
  static constexpr bool kPairs = Factor<E>::depth > 1;

  int64_t key_elements, elements;     // of a row along dstate, along headdim
  E *B, *B_tokens, *C_tokens;         // the depth along dstate; over tokens
  E *weighted_tokens, *weighted;      // e^{s_T - s_j} dt_j x_j, the depth over tokens; along headdim
  E *grown_tokens, *grown;            // e^{s_i} dY_i alike
  E *turned_gradient, *gradient;      // dR', the depth over dstate; over headdim
  E* entering;                        // R, the depth over headdim

  // Pieces of their own for pairs.
  StateFactors(Arena& arena, const Ssd& a, int64_t row, int64_t width)
      : key_elements(row / Factor<E>::depth), elements(width / Factor<E>::depth) {
    if constexpr (kPairs) {
      const int64_t tokens = a.chunk_tokens, pairs = depth_of<E>(tokens);
      B = arena.take<E>(tokens * key_elements);
      B_tokens = arena.take<E>(pairs * row), C_tokens = arena.take<E>(pairs * row);
      weighted_tokens = arena.take<E>(pairs * width), weighted = arena.take<E>(tokens * elements);
      grown_tokens = arena.take<E>(pairs * width), grown = arena.take<E>(tokens * elements);
      turned_gradient = arena.take<E>(depth_of<E>(a.dstate) * width);
      gradient = arena.take<E>(depth_of<E>(a.headdim) * row), entering = arena.take<E>(depth_of<E>(a.headdim) * row);
    }
  }

  // Numbers are factors as they lie.
  void use(A* key_B, A* key_C, A* weighted_x, A* grown_dy) {
    if constexpr (!kPairs) {
      B = B_tokens = key_B, C_tokens = key_C;
      weighted_tokens = weighted = weighted_x, grown_tokens = grown = grown_dy;
      turned_gradient = gradient = entering = nullptr;
    }
  }

  template <class T>
  void load_B(const Ssd& a, const SsdChunk& chunk, int64_t batch, int64_t group, int64_t row) {
    pack_tokens(a.B, head_of<T>(a.B, batch, group), Walk(a, chunk), chunk.length, a.dstate, B_tokens, row);
  }
  template <class T>
  void load(const Ssd& a, const SsdChunk& chunk, int64_t batch, int64_t group, int64_t row) {
    if constexpr (kPairs) {
      const Walk token(a, chunk);
      pack(a.B, head_of<T>(a.B, batch, group), token, chunk.length, a.dstate, B, key_elements);
      pack_tokens(a.C, head_of<T>(a.C, batch, group), token, chunk.length, a.dstate, C_tokens, row);
    }
  }
};

}  // namespace
}  // namespace mmkernels::MMK_ISA_NS
