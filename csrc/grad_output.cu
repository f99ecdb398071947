// From g = dL/dy to rank space: p = s B^T g and the gradients of B and I. In the order they run:
//
//   mix           what B was multiplied with, again
//   outer         the pass over g: partial dB of a chunk of tokens, and partial p over a block of outputs; or
//   shrink        another read of g for partial p, where the chosen experts have too many columns for that
//   mix_backward  dh from p; partial c and gate gradients of a tile
//   sum_tiles     c of every expert, and the gate gradients of every instance
//   collect, importance    dB and dI

#include "mix.cuh"
#include "outer.cuh"
#include "shrink.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kSumThreads = 512;  // few blocks, and long sums
constexpr int kWarps = kThreads / 32;

// Grid (tiles): a warp has every fourth token of a tile of an instance.
__global__ void __launch_bounds__(kThreads, 1) mix_backward_kernel(GradOutput p) {
  const int b = static_cast<int>(p.use_vu + p.use_if), K = static_cast<int>(p.K), r = static_cast<int>(p.r);
  const int columns = b * K * r, RP = rank_columns(r), width = b * K * RP;
  Arena arena;
  auto p_of = arena.take<float>(kWarps * columns);  // p of each warp's token
  auto c_of = arena.take<float>(kWarps * columns);  // sums over each warp's tokens
  auto q_of = arena.take<float>(kWarps * columns);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Span span =
      locate(blockIdx.x, global<const int>(p.cu), p.cu != nullptr, p.n, p.T / p.n, limits::kMixTile, 1);
  const int64_t start = span.start + span.tile * limits::kMixTile;
  const int64_t end = min(span.end, start + limits::kMixTile);
  if (threadIdx.x == 0) global<int>(p.tile_owner)[blockIdx.x] = start < end ? span.instance : -1;
  if (start >= end) return;
  const auto routes = global<const int>(p.routes) + static_cast<int64_t>(span.instance) * b * K;
  const auto gates = global<const float>(p.gates) + static_cast<int64_t>(span.instance) * b * K;
  for (int c = lane; c < columns; c += 32) c_of[warp * columns + c] = q_of[warp * columns + c] = 0;
  for (int64_t token = start + warp; token < end; token += kWarps) {
    const float lead = global<const float>(p.lead)[token];
    float ph = 0;  // p . h of the VU branch minus that of the IF branch
    for (int c = lane; c < columns; c += 32) {
      const int slot = c / r;
      const auto part = global<const float>(p.p_part) + (token * width + slot * RP + c % r);
      float sum = 0;
#pragma unroll 8
      for (int64_t i = 0; i < p.parts; ++i) sum += part[i * p.T * width];
      sum *= static_cast<float>(p.scaling);
      p_of[warp * columns + c] = sum;
      const float term = gates[slot] * sum * global<const float>(p.h)[token * columns + c];
      ph += slot < K ? term : -term;
    }
    float delta = 0;
    if (p.adaptive) delta = sigmoid(lead) * sigmoid(-lead) * warp_sum(ph);
    for (int c = lane; c < columns; c += 32) {
      const int slot = c / r;
      const bool vu = p.use_vu && slot < K;
      const float share = sigmoid(vu ? lead : -lead), signed_delta = vu ? delta : -delta;
      const float h = global<const float>(p.h)[token * columns + c];
      float gated = share * p_of[warp * columns + c];
      if (p.adaptive) {
        gated += signed_delta * global<const float>(p.w)[(routes[slot] + (vu ? 0 : p.M)) * r + c % r];
      }
      global<float>(p.dh)[token * columns + c] = gates[slot] * gated;
      c_of[warp * columns + c] += signed_delta * gates[slot] * h;
      q_of[warp * columns + c] += gated * h;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    float sum_c = 0, sum_q = 0;
    for (int w = 0; w < kWarps; ++w) sum_c += c_of[w * columns + c], sum_q += q_of[w * columns + c];
    const int64_t at = static_cast<int64_t>(blockIdx.x) * columns + c;
    if (p.need_c) global<float>(p.c_part)[at] = sum_c;
    if (p.need_gates) global<float>(p.q_part)[at] = sum_q;
  }
}

// Grid (M + N if c is needed, n b K if the gates' gradient is): an expert's c, then an instance's slot.
__global__ void __launch_bounds__(kSumThreads, 1) sum_tiles_kernel(GradOutput p, int64_t tiles) {
  const int64_t b = p.use_vu + p.use_if, K = p.K, r = p.r, E = p.need_c ? p.M + p.N : 0;
  Arena arena;
  auto scratch = arena.take<float>(kSumThreads);
  const int groups = kSumThreads / static_cast<int>(r);  // a thread has a rank of every groups-th tile
  const int group = threadIdx.x / r, rank = threadIdx.x % r;
  const auto owners = global<const int>(p.tile_owner);
  const bool of_expert = blockIdx.x < E;
  const int64_t item = of_expert ? blockIdx.x : blockIdx.x - E;
  const int64_t branch = item < p.M ? 0 : 1, expert = item - branch * p.M;
  float sum = 0;
  for (int64_t t = group; group < groups && t < tiles; t += groups) {
    const int64_t owner = owners[t];
    if (owner < 0) continue;
    if (of_expert) {
      for (int64_t j = 0; j < K; ++j) {
        const int64_t slot = branch * K + j;
        if (global<const int>(p.routes)[owner * b * K + slot] == expert) {
          sum += global<const float>(p.c_part)[(t * b * K + slot) * r + rank];
        }
      }
    } else if (owner == item / (b * K)) {
      sum += global<const float>(p.q_part)[(t * b * K + item % (b * K)) * r + rank];
    }
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < r) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += scratch[g * r + threadIdx.x];
    scratch[threadIdx.x] = total;
    if (of_expert) global<float>(p.c)[item * r + threadIdx.x] = static_cast<float>(p.scaling) * total;
  }
  __syncthreads();
  if (!of_expert && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < r; ++i) total += scratch[i];
    global<float>(p.dgates)[item] = total;
  }
}

// Grid (outputs, branches): dI, a warp an output, the sum over experts and ranks of B c; c has the scaling in it.
__global__ void __launch_bounds__(kThreads, 1) importance_kernel(GradOutput p) {
  const int64_t branch = blockIdx.y;
  const int64_t l = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (l >= p.k) return;
  const int64_t experts = branch ? p.N : p.M;
  const Weight B = branch ? p.if_B : p.vu_B;
  float sum = 0;
  for (int64_t i = lane; i < experts * p.r; i += 32) {
    const int64_t expert = i / p.r, rank = i % p.r;
    const float c = global<const float>(p.c)[(branch * p.M + expert) * p.r + rank];
    sum += weight_at(B, (expert * p.k + l) * p.r + rank) * c;
  }
  sum = warp_sum(sum);
  if (lane == 0) set_weight(branch ? p.dif_importance : p.dvu_importance, l, sum);
}

template <class T, int UNITS, bool P>
void launch_outer(const char* name, const Outer& p) {
  static_assert(kOuterShared<T, UNITS, P> <= limits::kSharedMemory);
  const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>(cdiv(p.L, kOuterInputs<T>)),
                  static_cast<unsigned>(cdiv(Units(p, p.K).total, UNITS)));
  launch(name, outer_kernel<T, UNITS, P>, grid, kOuterThreads, kOuterShared<T, UNITS, P>, p.stream, false, p);
}

}  // namespace

void outer(const char* name, const Outer& p) {
  const bool two = Units(p, p.K).total <= 2;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.p_part == nullptr) {
      two ? launch_outer<T, 2, false>(name, p) : launch_outer<T, 4, false>(name, p);
    } else if constexpr (sizeof(T) == 2) {
      two ? launch_outer<T, 2, true>(name, p) : launch_outer<T, 4, true>(name, p);
    } else {
      launch_outer<T, 2, true>(name, p);  // four have no room in shared memory
    }
  });
}

void grad_output(const GradOutput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank_columns(p.r), slots = (p.use_vu + p.use_if) * p.K;
  const bool need_B = p.need_vu_B || p.need_if_B;
  if (need_B) {
    Mix m;
    static_cast<Layout&>(m) = p;
    m.h = p.h, m.routes = p.routes, m.gates = p.gates, m.lead = const_cast<float*>(p.lead), m.given = 1, m.u = p.u;
    mix(m);
  }
  Outer o;
  static_cast<Layout&>(o) = p;
  o.s = p.g, o.u = p.u, o.L = p.k, o.chunk = p.chunk, o.chunks = p.chunks, o.adds_up = need_B, o.part = p.B_part;
  o.owner = p.chunk_owner, o.routes = p.routes;
  const int64_t width = cdiv(p.k, 8) * 8;
  const void* vu = p.vu_packed != nullptr ? p.vu_packed : p.vu_B.data;
  const void* other = p.if_packed != nullptr ? p.if_packed : p.if_B.data;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = p.one_read ? p.k : RP, columns = p.one_read ? RP : width;
    if (p.need_p) {
      pack<T>(p, {{p.vu_B, p.if_B}, {p.vu_packed, p.if_packed}, {p.M, p.N}, p.k, p.r, rows, columns}, !p.one_read);
    }
  });
  if (need_B || (p.need_p && p.one_read)) {
    o.weights = {vu, other, p.k * RP, RP};
    o.p_part = p.need_p && p.one_read ? p.p_part : nullptr;
    outer("grad_output", o);
  }
  if (p.need_p && !p.one_read) {
    Shrink s;
    static_cast<Layout&>(s) = p;
    s.s = p.g, s.L = p.k, s.width = width, s.weights = {vu, other, RP * width, width};
    s.vu_slots = p.K, s.routes = p.routes, s.splits = p.parts, s.part = p.p_part;
    shrink(s, p.columns);
  }
  if (p.need_p) {
    const int64_t tiles = tile_count(p, limits::kMixTile, 1);
    const size_t shared = 3 * cdiv(kWarps * slots * p.r * 4, 16) * 16;
    launch("mix_backward", mix_backward_kernel, dim3(static_cast<unsigned>(tiles)), kThreads, shared, p.stream, false,
           p);
    const int64_t sums = (p.need_c ? p.M + p.N : 0) + (p.need_gates ? p.n * slots : 0);
    launch("sum_tiles", sum_tiles_kernel, dim3(static_cast<unsigned>(sums)), kSumThreads, kSumThreads * 4, p.stream,
           false, p, tiles);
  }
  Collect c;
  static_cast<Layout&>(c) = p;
  c.part = p.B_part, c.owner = p.chunk_owner, c.routes = p.routes, c.L = p.k, c.chunks = p.chunks;
  c.addend[0] = p.vu_importance, c.addend[1] = p.if_importance;
  c.factor = p.need_c ? p.c : nullptr;
  if (p.need_vu_B) c.out[0] = p.dvu_B;
  if (p.need_if_B) c.out[1] = p.dif_B;
  if (need_B) collect(c);
  if (p.need_importance) {
    launch("importance", importance_kernel, dim3(static_cast<unsigned>(cdiv(p.k, kWarps)), 2), kThreads, 0, p.stream,
           false, p);
  }
}
