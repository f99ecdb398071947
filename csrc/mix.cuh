// Between shrink and expand: what B is multiplied with, u = s c h. The coefficients c are a mix's, a struct of the formulas
// in mixes/; q is a slot's weight. A mix with `kScores` makes a number of each token's h first, on which c hangs.
#pragma once

#include "mixes/smolora.cuh"
#include "mixes/weighted.cuh"
#include "primitives.cuh"

// Calls f with the mix.
template <class F>
__host__ __device__ __forceinline__ void with_mix(int64_t mix, F f) {
  if (mix == kSmolora) {
    f(Smolora());
  } else {
    f(Weighted());
  }
}

struct Mix : Layout {
  int64_t E0 = 0;                // experts of the first bank
  const float* h = nullptr;      // (T, b, K', r)
  const float* w = nullptr;      // (sum E, r)
  const float* given = nullptr;  // (T,): scores that are known; null: they are made
  float* scores = nullptr;       // (T,) out
  void* u = nullptr;             // (T, b K RP) T out, zero past each rank

  explicit Mix(const Pass& p) : Layout(p), E0(p.banks[0].E) {}
};
void mix(const Mix& p);

// A sequence's slots as a mix sees them; slots count through the banks.
struct SlotsOf {
  Ptr<const int> ids;
  Ptr<const float> weights;
  bool in_order, unweighted;
  int K, E0;

  __device__ __forceinline__ SlotsOf(const Layout& p, int64_t seq, int64_t E0_)
      : ids(global<const int>(p.ids)), weights(global<const float>(p.slot_weights)), in_order(p.ids == nullptr),
        unweighted(p.slot_weights == nullptr), K(static_cast<int>(p.K)), E0(static_cast<int>(E0_)) {
    if (!in_order) ids = ids + seq * p.b * K;
    if (!unweighted) weights = weights + seq * p.b * K;
  }
  __device__ __forceinline__ int bank(int slot) const { return slot >= K; }
  __device__ __forceinline__ float weight(int slot) const { return unweighted ? 1.0f : weights[slot]; }
  // The row of w.
  __device__ __forceinline__ int row(int slot) const {
    return expert_in(ids, in_order, slot, slot >= K ? slot - K : slot) + (slot >= K ? E0 : 0);
  }
};
