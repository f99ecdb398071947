// Mix "smolora": c = q alpha in the first bank and q beta in the second, where alpha and beta are a token's softmax
// over I . x_1 and I . x_2 (Eq. 8 and 9). The score is I . x_1 - I . x_2, computed as w . h in rank space; alpha is
// sigmoid(score) and beta sigmoid(-score), not 1 - alpha, which rounds a small beta away.
#pragma once

#include "../primitives.cuh"

struct Smolora {
  static constexpr bool kScores = true;

  // What a number of h adds to the token's score, `with` being w; and to the score's gradient, `with` being p.
  __device__ static __forceinline__ float score_term(int bank, float q, float with, float h) {
    const float term = q * with * h;
    return bank == 0 ? term : -term;
  }
  __device__ static __forceinline__ float coefficient(int bank, float q, float score) {
    return sigmoid(bank == 0 ? score : -score) * q;
  }
  __device__ static __forceinline__ float dscore(float score, float sum) {
    return sigmoid(score) * sigmoid(-score) * sum;
  }
  // The gradient of q h, times h that of q, times q that of h.
  __device__ static __forceinline__ float gated(int bank, float score, float dscore, float p, float w) {
    return sigmoid(bank == 0 ? score : -score) * p + (bank == 0 ? dscore : -dscore) * w;
  }
  __device__ static __forceinline__ float dw(int bank, float q, float dscore, float h) {
    return (bank == 0 ? dscore : -dscore) * q * h;
  }
};
