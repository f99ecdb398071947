// Between shrink and expand: u = c h, the right operand of the up-projection. A mix gives the coefficients c; it is a
// struct of formulas in mixes/, where q is a slot's weight. A mix with `kScores` first makes a score of each token's h,
// and c depends on it.
#pragma once

#include "mixes/smolora.cuh"
#include "mixes/weighted.cuh"
#include "primitives.cuh"

// Calls f with the mix.
#ifdef __NVCC__
#pragma nv_exec_check_disable  // f runs where its caller does
#endif
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
  const float* given = nullptr;  // (T,): known scores; null: they are made
  float* scores = nullptr;       // (T,) out
  void* u = nullptr;             // (T, b K RP) out, zero past each rank

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
