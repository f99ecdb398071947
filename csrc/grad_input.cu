// From rank space back to the input: dx, and the gradients of A from one read of x. In the order they run:
//
//   round    dh in the compute dtype
//   expand   dx
//   outer    partial dA of a chunk of tokens
//   collect  dA of every expert

#include "expand.cuh"
#include "outer.cuh"

namespace {

constexpr int kThreads = 256;

// Grid (blocks of r L, experts).
__global__ void __launch_bounds__(kThreads) collect_kernel(Collect p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, expert = blockIdx.y;
  if (i >= p.r * p.L) return;
  const int64_t rank = p.by_column ? i / p.L : i % p.r, l = p.by_column ? i % p.L : i / p.r;
  const int64_t b = p.use_vu + p.use_if, slot0 = b == 2 ? p.branch : 0;
  const int RP = rank_columns(p.r);
  const auto routes = global<const int>(p.routes);
  const auto part = global<const float>(p.part);
  float sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t owner = global<const int>(p.owner)[chunk];
    for (int64_t j = 0; owner >= 0 && j < p.K; ++j) {
      if (routes[(owner * b + slot0) * p.K + j] != expert) continue;
      const int64_t column = (chunk * b * p.K + slot0 * p.K + j) * RP + rank;
      sum += part[p.by_column ? column * p.L + l : (column / 16 * p.L + l) * 16 + column % 16];
    }
  }
  sum *= static_cast<float>(p.scale);
  if (p.factor != nullptr) sum += weight_at(p.addend, l) * global<const float>(p.factor)[expert * p.r + rank];
  set_weight(p.out, expert * p.r * p.L + i, sum);
}

}  // namespace

void collect(const Collect& p) {
  launch("collect", collect_kernel,
         dim3(static_cast<unsigned>(cdiv(p.r * p.L, kThreads)), static_cast<unsigned>(p.experts)), kThreads, 0,
         p.stream, false, p);
}

void grad_input(const GradInput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank_columns(p.r), slots = (p.use_vu + p.use_if) * p.K;
  const double scale = 256.0 / static_cast<double>(256 - p.threshold);
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    pack<T>(p, Weight{p.dh, kFloat32}, p.u, p.T * slots, 1, p.r, false, 1, RP);
    if (p.need_dx) {
      pack<T>(p, p.vu_A, p.vu_packed, p.M, p.r, p.d, true, p.d, RP);
      pack<T>(p, p.if_A, p.if_packed, p.N, p.r, p.d, true, p.d, RP);
      Expand e;
      static_cast<Layout&>(e) = p;
      e.u = p.u, e.routes = p.routes, e.L = p.d, e.splits = p.splits, e.dmean = p.dmean, e.mask = p.mask;
      e.out = p.dx;
      e.weights = {p.vu_packed, p.if_packed, p.d * RP, RP};
      expand("grad_input dx", e);
    }
  });
  if (p.need_vu_A || p.need_if_A) {
    Outer o;
    static_cast<Layout&>(o) = p;
    o.s = p.x, o.u = p.u, o.L = p.d, o.chunk = p.chunk, o.chunks = p.chunks, o.by_column = 1, o.part = p.A_part;
    o.owner = p.chunk_owner;
    outer("grad_input dA", o);
  }
  Collect c;
  static_cast<Layout&>(c) = p;
  c.part = p.A_part, c.owner = p.chunk_owner, c.routes = p.routes, c.L = p.d, c.chunks = p.chunks, c.by_column = 1;
  c.scale = scale;
  for (int branch = 0; branch < 2; ++branch) {
    if (!(branch ? p.need_if_A : p.need_vu_A)) continue;
    c.branch = branch, c.experts = branch ? p.N : p.M, c.out = branch ? p.dif_A : p.dvu_A;
    collect(c);
  }
}
