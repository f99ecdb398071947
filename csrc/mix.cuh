// Between shrink and expand: what B is multiplied with, u = s c h. The coefficients c are a mix's, a struct of formulas in
// mixes/; q is a slot's weight. A mix with `kScores` makes a number of each token's h first, on which c hangs.
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
  const Layout& p;
  int64_t at;  // the first of its slots
  int K, E0;

  __device__ __forceinline__ SlotsOf(const Layout& p_, int64_t seq, int64_t E0_)
      : p(p_), at(seq * p.b * p.K), K(static_cast<int>(p.K)), E0(static_cast<int>(E0_)) {}
  __device__ __forceinline__ int bank(int slot) const { return slot >= K; }
  __device__ __forceinline__ float weight(int slot) const {
    return p.slot_weights == nullptr ? 1.0f : global<const float>(p.slot_weights)[at + slot];
  }
  // The row of w.
  __device__ __forceinline__ int row(int slot) const {
    return expert_in(global<const int>(p.ids), p.ids == nullptr, at + slot, slot >= K ? slot - K : slot) +
           (slot >= K ? E0 : 0);
  }
};
