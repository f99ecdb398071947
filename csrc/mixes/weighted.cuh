// Mix "weighted": c = q, the slot's weight.
#pragma once

#include "../primitives.cuh"

struct Weighted {
  static constexpr bool kScores = false;

  __device__ static __forceinline__ float coefficient(int, float q, float) { return q; }
  __device__ static __forceinline__ float gated(int, float, float, float p, float) { return p; }
};
