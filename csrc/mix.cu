// The right operand of the up-projection:
//
//   mix_kernel  u = c h, and the scores that c depends on

#include "mix.cuh"

namespace {

constexpr int kThreads = 128;

// A warp has a token.
template <class Scalar, class M>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(Mix p) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= p.T) return;
  const int slots = static_cast<int>(p.b * p.K), r = static_cast<int>(p.r), down = static_cast<int>(down_slots(p));
  const SlotsOf of(p, seq_of(p, token), p.E0);
  const auto h = global<const float>(p.h) + token * p.b * down * r;
  const auto h_slot = [&](int slot) { return p.shared ? of.bank(slot) : slot; };
  float score = 0;
  if constexpr (M::kScores) {
    if (p.given != nullptr) {
      score = global<const float>(p.given)[token];
    } else {
#pragma unroll 2
      for (int c = lane; c < slots * r; c += 32) {
        const int slot = c / r, rank = c % r;
        const float w = global<const float>(p.w)[of.row(slot) * r + rank];
        score += M::score_term(of.bank(slot), of.weight(slot), w, h[h_slot(slot) * r + rank]);
      }
      score = warp_sum(score);
      if (lane == 0) global<float>(p.scores)[token] = score;
    }
  }
  const int RP = rank16(r);
  for (int c = lane; c < slots * RP; c += 32) {
    const int slot = c / RP, rank = c % RP;
    const float with = static_cast<float>(p.scaling) * M::coefficient(of.bank(slot), of.weight(slot), score);
    global<Scalar>(p.u)[token * slots * RP + c] =
        from_float<Scalar>(rank < r ? h[h_slot(slot) * r + rank] * with : 0.0f);
  }
}

}  // namespace

void mix(const Mix& p) {
  with_dtype(p.dtype, [&](auto zero) {
    with_mix(p.mix, [&](auto formulas) {
      const dim3 grid(static_cast<unsigned>(cdiv(p.T, kThreads / 32)));
      launch("mix", mix_kernel<decltype(zero), decltype(formulas)>, grid, kThreads, 0, p.stream, false, p);
    });
  });
}
