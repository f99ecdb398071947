// Fuse the branches in rank space (mix) and expand them to the output: y is written once.

#include "expand.cuh"
#include "mix.cuh"

namespace {

constexpr int kThreads = 128;

// A warp has a token.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) mix_kernel(Mix p) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= p.T) return;
  const int b = static_cast<int>(p.use_vu + p.use_if), K = static_cast<int>(p.K), r = static_cast<int>(p.r);
  const int columns = b * K * r, M = static_cast<int>(p.M);
  const int64_t i = instance_of(token, global<const int>(p.cu), p.cu != nullptr, p.n, p.T / p.n);
  const auto h = global<const float>(p.h) + token * columns;
  const auto routes = global<const int>(p.routes) + i * b * K;
  const auto gates = global<const float>(p.gates) + i * b * K;
  float lead = static_cast<float>(p.fixed_lead);
  if (p.given) {
    lead = global<const float>(p.lead)[token];
  } else if (p.adaptive) {
    float score = 0;  // I . x_vu - I . x_if
    for (int c = lane; c < columns; c += 32) {
      const int slot = c / r, rank = c % r;
      const bool vu = slot < K;
      const int expert = routes[slot] + (vu ? 0 : M);
      const float term = gates[slot] * global<const float>(p.w)[expert * r + rank] * h[c];
      score += vu ? term : -term;
    }
    lead = warp_sum(score);
  }
  if (!p.given && lane == 0) global<float>(p.lead)[token] = lead;
  const int RP = rank_columns(r);
  for (int c = lane; c < b * K * RP; c += 32) {
    const int slot = c / RP, rank = c % RP;
    const float share = sigmoid(p.use_vu && slot < K ? lead : -lead);
    const float v = rank < r ? h[slot * r + rank] * (static_cast<float>(p.scaling) * share) * gates[slot] : 0.0f;
    global<T>(p.u)[token * b * K * RP + c] = from_float<T>(v);
  }
}

template <class T, bool DROPS>
void launch_expand(const char* name, const Expand& p) {
  static_assert(kExpandShared<T> <= limits::kSharedMemory);
  const auto tiles = static_cast<unsigned>(tile_count(p, limits::kTile, 1));
  launch(name, expand_kernel<T, DROPS>, dim3(tiles, static_cast<unsigned>(p.splits)), kExpandThreads,
         kExpandShared<T>, p.stream, false, p);
}

}  // namespace

void expand(const char* name, const Expand& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    p.threshold > 0 ? launch_expand<T, true>(name, p) : launch_expand<T, false>(name, p);
  });
}

void mix(const Mix& p) {
  with_dtype(p.dtype, [&](auto zero) {
    launch("mix", mix_kernel<decltype(zero)>, dim3(static_cast<unsigned>(cdiv(p.T, kThreads / 32))), kThreads, 0,
           p.stream, false, p);
  });
}

void fuse_expand(const FuseExpand& p) {
  use_device(static_cast<int>(p.device));
  Mix m;
  static_cast<Layout&>(m) = p;
  m.h = p.h, m.w = p.w, m.routes = p.routes, m.gates = p.gates, m.lead = p.lead, m.u = p.u;
  mix(m);
  const int64_t RP = rank_columns(p.r);
  Expand e;
  static_cast<Layout&>(e) = p;
  e.u = p.u, e.routes = p.routes, e.L = p.k, e.splits = p.splits, e.bias = p.bias, e.out = p.y;
  e.weights = {p.vu_packed != nullptr ? p.vu_packed : p.vu_B.data, p.if_packed != nullptr ? p.if_packed : p.if_B.data,
               p.k * RP, RP};
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    pack<T>(p, {{p.vu_B, p.if_B}, {p.vu_packed, p.if_packed}, {p.M, p.N}, p.k, p.r, p.k, RP}, false);
  });
  expand("fuse_expand", e);
}
