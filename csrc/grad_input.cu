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

// Grid (blocks of r L, M + N). Which chunks an expert was chosen in, each thread asks of one chunk, for all.
__global__ void __launch_bounds__(kThreads, 1) collect_kernel(Collect p) {
  Arena arena;
  auto slots = arena.take<int>(kThreads);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool vu = blockIdx.y < p.M;
  const int64_t expert = vu ? blockIdx.y : blockIdx.y - p.M;
  const Weight out = vu ? p.out[0] : p.out[1];
  if (out.data == nullptr) return;
  const int64_t rank = p.by_column ? i / p.L : i % p.r, l = p.by_column ? i % p.L : i / p.r;
  const int64_t b = p.use_vu + p.use_if, slot0 = vu ? 0 : b - 1;
  const int RP = rank_columns(p.r);
  const auto routes = global<const int>(p.routes);
  const auto part = global<const float>(p.part);
  float sum = 0;
  for (int64_t first = 0; first < p.chunks; first += kThreads) {
    const int64_t asked = first + threadIdx.x, owner = asked < p.chunks ? global<const int>(p.owner)[asked] : -1;
    int slot = 0;  // the first with the expert; given routes may have it several times
    while (slot < p.K && (owner < 0 || routes[(owner * b + slot0) * p.K + slot] != expert)) ++slot;
    __syncthreads();
    slots[threadIdx.x] = slot;
    __syncthreads();
    const int count = static_cast<int>(min(p.chunks - first, static_cast<int64_t>(kThreads)));
#pragma unroll 4
    for (int chunk = 0; chunk < count; ++chunk) {
      for (int64_t j = slots[chunk]; j < p.K && i < p.r * p.L; ++j) {
        if (j > slots[chunk] && routes[(global<const int>(p.owner)[first + chunk] * b + slot0) * p.K + j] != expert) {
          continue;
        }
        const int64_t column = ((first + chunk) * b * p.K + slot0 * p.K + j) * RP + rank;
        sum += part[p.by_column ? column * p.L + l : (column / 16 * p.L + l) * 16 + column % 16];
      }
    }
  }
  if (i >= p.r * p.L) return;
  sum *= static_cast<float>(p.scale);
  if (p.factor != nullptr) {
    sum += weight_at(vu ? p.addend[0] : p.addend[1], l) * global<const float>(p.factor)[blockIdx.y * p.r + rank];
  }
  set_weight(out, expert * p.r * p.L + i, sum);
}

}  // namespace

void collect(const Collect& p) {
  launch("collect", collect_kernel,
         dim3(static_cast<unsigned>(cdiv(p.r * p.L, kThreads)), static_cast<unsigned>(p.M + p.N)), kThreads,
         kThreads * sizeof(int), p.stream, false, p);
}

void grad_input(const GradInput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank_columns(p.r), slots = (p.use_vu + p.use_if) * p.K;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    pack<T>(p, {{{p.dh, kFloat32}, {}}, {p.u, nullptr}, {p.T * slots, 0}, 1, p.r, 1, RP}, false);
    if (p.need_dx) {
      pack<T>(p, {{p.vu_A, p.if_A}, {p.vu_packed, p.if_packed}, {p.M, p.N}, p.r, p.d, p.d, RP}, true);
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
  c.scale = 256.0 / static_cast<double>(256 - p.threshold);
  if (p.need_vu_A) c.out[0] = p.dvu_A;
  if (p.need_if_A) c.out[1] = p.dif_A;
  if (p.need_vu_A || p.need_if_A) collect(c);
}
