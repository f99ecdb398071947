// x -> routes and h, with one read of x (the symbols are those of docs/architecture.md). In the order they run:
//
//   route_instruction_and_w_kernel  routers of the instruction, the routed tokens, and partial sums of w = s B^T I
//   pad                             A as the product reads it
//   shrink                          the pass over x: A x of the slots (or of all experts of a bank), and column sums
//   router_logits_kernel            the mean of x over routed tokens, the logits of the routers of x, and their slots
//   reduce_split_k_kernel           h of the slots, and w, from their parts
//
// A router of x decides only when all of a sequence has been read, so one pass computes all experts of its bank. When
// they have too many columns for that, a first pass takes the column sums alone and a second one the chosen experts. A
// route must not depend on batch or padding: all sums over tokens and inputs run in an order that only the sequence and
// the layer set.

#include "mix.cuh"
#include "pad.cuh"
#include "shrink.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRouteThreads = 512;

// Chooses a sequence's slots of a bank by its logits z; by one thread.
__device__ __forceinline__ void choose_slots(const RouteShrink& p, Ptr<const float> z, int E, int64_t seq, int bank) {
  const int64_t at = (seq * p.b + bank) * p.K;
  choose(z, E, static_cast<int>(p.K), p.gate_all, global<int>(p.routed_ids) + at,
         global<float>(p.routed_weights) + at);
}

// The first of a sequence's routers in a bank's.
__device__ __forceinline__ int64_t first_router(const RouteShrink& p, int E, int64_t seq) {
  return p.router_rows == nullptr ? 0 : global<const int64_t>(p.router_rows)[seq] * E;
}

// Grid (n + (sum E) parts): a sequence, then a part of an expert's w.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1) route_instruction_and_w_kernel(RouteShrink p) {
  const int E0 = static_cast<int>(p.banks[0].E), E = E0 + static_cast<int>(p.banks[1].E);
  SmemAllocator smem;
  auto scratch = smem.take<float>(max(4 * kThreads, E));
  auto tokens = smem.take<int64_t>(2 * kThreads);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t seqs = p.routes ? p.n : 0;
  if (blockIdx.x < seqs) {
    const int64_t i = blockIdx.x;
    if (p.banks[0].router_reads_x || p.banks[1].router_reads_x) {
      const auto cu = global<const int>(p.cu_seqlens);
      const int64_t start = p.cu_seqlens != nullptr ? cu[i] : i * (p.T / p.n);
      const int64_t length = p.cu_seqlens != nullptr ? cu[i + 1] - start : p.T / p.n;
      int64_t first = p.route_mask == nullptr ? 0 : length, count = p.route_mask == nullptr ? length : 0;
      if (p.route_mask != nullptr) {
#pragma unroll 8
        for (int64_t t = thread; t < length; t += kThreads) {  // branch-free, so that loads overlap
          const bool routes = global<const uint8_t>(p.route_mask)[start + t];
          first = routes ? min(first, t) : first;
          count += routes;
        }
        tokens[thread] = first;
        tokens[kThreads + thread] = count;
        __syncthreads();
        if (thread == 0) {
          for (int t = 1; t < kThreads; ++t) first = min(first, tokens[t]), count += tokens[kThreads + t];
        }
      }
      if (thread == 0) {
        global<int64_t>(p.routed)[i * 2] = first;
        global<int64_t>(p.routed)[i * 2 + 1] = count;
        global<int>(p.arrived)[i] = 0;
      }
    }
    for (int expert = warp; expert < E; expert += kWarps) {
      const bool second = expert >= E0;
      if (second ? p.banks[1].router_reads_x : p.banks[0].router_reads_x) continue;
      const int64_t row = first_router(p, second ? E - E0 : E0, i) + expert - (second ? E0 : 0);
      const Weight& router = second ? p.banks[1].router : p.banks[0].router;
      const float sum = warp_dot(router, row * p.e, p.instruction, i * p.e, p.e);
      if (lane == 0) {
        scratch[expert] = sum;
        global<float>(p.logits)[i * E + expert] = sum;
      }
    }
    __syncthreads();
    if (thread == 0) {
      if (!p.banks[0].router_reads_x) choose_slots(p, scratch, E0, i, 0);
      if (p.b > 1 && !p.banks[1].router_reads_x) choose_slots(p, scratch + E0, E - E0, i, 1);
    }
    return;
  }
  const int64_t item = blockIdx.x - seqs, expert = item % E;
  const int64_t begin = item / E * limits::kWPartOutputs, end = min(p.k, begin + limits::kWPartOutputs);
  const bool second = expert >= E0;
  const Weight& B = second ? p.banks[1].B : p.banks[0].B;
  const Weight& importance = second ? p.banks[1].importance : p.banks[0].importance;
  add_w_part<Scalar, kThreads>(p, B, importance, p.k, second ? expert - E0 : expert, begin, end, scratch,
                               global<float>(p.w_part) + item * p.r);
}

// Grid (n, slices of d): the mean of a sequence's routed tokens over a slice, and its part of the logits; the last
// slice to be ready adds the parts in their order and chooses. Four groups of threads share the tiles, which they count
// from the first routed token.
__global__ void __launch_bounds__(kRouteThreads, 1) router_logits_kernel(RouteShrink p) {
  constexpr int GROUPS = 4, LANES = kRouteThreads / GROUPS, COLUMNS = kRouteThreads / LANES;
  static_assert(limits::kRouteInputs == kRouteThreads);
  const int E0 = static_cast<int>(p.banks[0].E), E = E0 + static_cast<int>(p.banks[1].E);
  SmemAllocator smem;
  auto group_sums = smem.take<float>(GROUPS * kRouteThreads);
  auto scratch = smem.take<float>(kRouteThreads / 32);
  auto z = smem.take<float>(E);
  auto last = smem.take<int>(1);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t i = blockIdx.x, slice = blockIdx.y, slices = gridDim.y, c0 = slice * limits::kRouteInputs;
  const auto cu = global<const int>(p.cu_seqlens);
  const int64_t length = p.cu_seqlens != nullptr ? cu[i + 1] - cu[i] : p.T / p.n;
  const auto routed = global<const int64_t>(p.routed);
  const int64_t base = tile_base(p, i, limits::kTile, p.route_mask != nullptr ? 2 : 1);
  const int64_t offset = (limits::kTile - routed[i * 2] % limits::kTile) % limits::kTile;
  const int64_t end = base + cdiv(length + offset, limits::kTile);
  float sum[COLUMNS] = {};
#pragma unroll 4
  for (int64_t t = base + (routed[i * 2] + offset) / limits::kTile + thread / LANES; t < end; t += GROUPS) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int64_t c = c0 + j * LANES + thread % LANES;
      if (c < p.d) sum[j] += global<const float>(p.sums)[t * p.d + c];
    }
  }
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    group_sums[thread / LANES * kRouteThreads + j * LANES + thread % LANES] = sum[j];
  }
  __syncthreads();
  const int64_t c = c0 + thread;
  float mean = 0;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) mean += group_sums[group * kRouteThreads + thread];
  mean /= static_cast<float>(max(routed[i * 2 + 1], static_cast<int64_t>(1)));
  if (c < p.d) global<float>(p.mean)[i * p.d + c] = mean;
  auto z_part = global<float>(p.z_part);
  for (int expert = 0; expert < E; ++expert) {
    const bool second = expert >= E0;
    if (!(second ? p.banks[1].router_reads_x : p.banks[0].router_reads_x)) continue;
    const int64_t row = first_router(p, second ? E - E0 : E0, i) + expert - (second ? E0 : 0);
    const Weight& router = second ? p.banks[1].router : p.banks[0].router;
    const float term = warp_sum(c < p.d ? mean * weight_at(router, row * p.d + c) : 0.0f);
    if (lane == 0) scratch[warp] = term;
    __syncthreads();
    if (thread == 0) {
      float total = 0;
      for (int w = 0; w < kRouteThreads / 32; ++w) total += scratch[w];
      z_part[(i * slices + slice) * E + expert] = total;
    }
    __syncthreads();
  }
  if (thread == 0) {
    __threadfence();
    last[0] = atomicAdd(&global<int>(p.arrived)[i], 1) == slices - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  for (int expert = thread; expert < E; expert += kRouteThreads) {
    if (!(expert >= E0 ? p.banks[1].router_reads_x : p.banks[0].router_reads_x)) continue;
    float sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += z_part[(i * slices + s) * E + expert];
    z[expert] = sum;
    global<float>(p.logits)[i * E + expert] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    if (p.banks[0].router_reads_x) choose_slots(p, z, E0, i, 0);
    if (p.banks[1].router_reads_x) choose_slots(p, z + E0, E - E0, i, 1);
  }
}

// A thread has an element of h, or one of w. `parts` is the product that made the parts of h; with fused routing it has
// all experts of the banks that x routes.
__global__ void __launch_bounds__(kThreads, 1) reduce_split_k_kernel(RouteShrink p, Shrink parts) {
  const int r = static_cast<int>(p.r), down = static_cast<int>(down_slots(p));
  const int64_t columns = p.b * down * r, size = p.T * columns;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    const int RP = rank16(r);
    const RankTiles tiles(parts);
    const int64_t token = i / columns;
    const int column = static_cast<int>(i - token * columns), slot = column / r, rank = column % r;
    const bool second = slot >= down;
    int64_t source = second ? slot - down : slot;
    if ((second ? parts.in_order[1] : parts.in_order[0]) && !p.shared && p.ids != nullptr) {
      source = global<const int>(p.ids)[seq_of(p, token) * p.b * down + slot];
    }
    source = source * RP + rank + (second ? tiles.first * 16 : 0);
    float sum = 0;
    for (int64_t s = 0; s < p.split_k; ++s) {
      sum += global<const float>(p.part)[(s * p.T + token) * tiles.total * 16 + source];
    }
    global<float>(p.h)[i] = sum * (256.0f / static_cast<float>(256 - p.threshold));
    return;
  }
  i -= size;
  const int64_t numbers = (p.banks[0].E + p.banks[1].E) * r;
  if (p.w != nullptr && i < numbers) {
    float sum = 0;
    const int64_t parts_of_w = cdiv(p.k, limits::kWPartOutputs);
    for (int64_t part = 0; part < parts_of_w; ++part) sum += global<const float>(p.w_part)[part * numbers + i];
    global<float>(p.w)[i] = sum;
  }
}

}  // namespace

void route_shrink(const RouteShrink& given) {
  use_device(static_cast<int>(given.device));
  RouteShrink p = given;
  if (p.routes) {
    p.ids = p.routed_ids;  // once they are there
    p.slot_weights = p.routed_weights;
  }
  const bool reads_x = p.banks[0].router_reads_x || p.banks[1].router_reads_x;
  const int64_t RP = rank16(p.r), width = cdiv(p.d, 8) * 8, E = p.banks[0].E + p.banks[1].E;
  with_dtype(p.dtype, [&](auto zero) {
    const int64_t items = (p.routes ? p.n : 0) + (p.w != nullptr ? E * cdiv(p.k, limits::kWPartOutputs) : 0);
    const size_t shared = cdiv(std::max<int64_t>(4 * kThreads, E) * 4, 16) * 16 + 16 * kThreads;
    launch("route_instruction_and_w", route_instruction_and_w_kernel<decltype(zero)>,
           dim3(static_cast<unsigned>(items)), kThreads, shared, p.stream, false, p);
  });
  pad(p, &Bank::A, p.r, p.d, RP, width, false);
  Shrink s(p, Space::kDown);
  s.src = p.x;
  s.L = p.d;
  s.width = width;
  for (int bank = 0; bank < p.b; ++bank) s.weights.bank[bank] = padded_weight(p.banks[bank], p.banks[bank].A);
  s.weights.expert = RP * width;
  s.weights.row = width;
  s.split_k = p.split_k;
  s.part = p.part;
  for (int bank = 0; bank < p.b && p.fused_routing && !p.shared; ++bank) {
    if (!p.banks[bank].router_reads_x) continue;
    s.slots[bank] = p.banks[bank].E;
    s.in_order[bank] = 1;
  }
  if (reads_x) {
    Shrink sum = s;
    sum.multiplies = p.fused_routing;
    if (!p.fused_routing) sum.split_k = p.sum_split_k;
    sum.sums = p.sums;
    sum.route_mask = p.route_mask;
    sum.routed = p.routed;
    shrink(sum, p.fused_routing ? p.columns : 32);
    const size_t shared = 4 * (4 * kRouteThreads + kRouteThreads / 32) + cdiv(E * 4, 16) * 16 + 16;
    const dim3 grid(static_cast<unsigned>(p.n), static_cast<unsigned>(cdiv(p.d, limits::kRouteInputs)));
    launch("router_logits", router_logits_kernel, grid, kRouteThreads, shared, p.stream, false, p);
  }
  if (!p.fused_routing) shrink(s, p.columns);
  const int64_t elements = p.T * p.b * down_slots(p) * p.r + (p.w != nullptr ? E * p.r : 0);
  launch("reduce_split_k", reduce_split_k_kernel, dim3(static_cast<unsigned>(cdiv(elements, kThreads))), kThreads, 0,
         p.stream, false, p, s);
}
