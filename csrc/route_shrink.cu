// Route each instance and bring its tokens into rank space: one read of x. In the order they run:
//
//   prepare  IF routing, the routed tokens of each instance, and partial sums of w = s B^T I
//   shrink   the pass over x: A x of every VU expert (or of the chosen) and the chosen IF experts, and column sums
//   route    the mean of x over routed tokens, and the VU routes
//   finish   h of the chosen experts, and w, from their parts
//
// The VU route is known only when all of an instance has been read, so one pass computes all VU experts; when they have
// too many columns for that, a first pass takes the sums alone and a second one the chosen experts. A route must not
// depend on batch or padding: all sums over tokens and inputs run in an order that only the instance and the layer set.

#include "shrink.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRouteThreads = 512;

// Grid (n + (M + N) parts): an instance, then a part of an expert's w.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) prepare_kernel(RouteShrink p) {
  Arena arena;
  auto scratch = arena.take<float>(max(4 * kThreads, static_cast<int>(p.N)));
  auto tokens = arena.take<int64_t>(2 * kThreads);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t instances = p.route ? p.n : 0;
  if (blockIdx.x < instances) {
    const int64_t i = blockIdx.x, b = p.use_vu + p.use_if;
    if (p.use_vu) {
      const auto cu = global<const int>(p.cu);
      const int64_t start = p.cu != nullptr ? cu[i] : i * (p.T / p.n);
      const int64_t length = p.cu != nullptr ? cu[i + 1] - start : p.T / p.n;
      int64_t first = p.mask == nullptr ? 0 : length, count = p.mask == nullptr ? length : 0;
      if (p.mask != nullptr) {
#pragma unroll 8
        for (int64_t t = thread; t < length; t += kThreads) {  // without a branch, so that loads need not wait
          const bool routes = global<const uint8_t>(p.mask)[start + t];
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
    if (p.use_if) {
      for (int64_t expert = warp; expert < p.N; expert += kWarps) {
        const float sum = warp_dot(p.if_router, expert * p.e, p.instruction, i * p.e, p.e);
        if (lane == 0) {
          scratch[expert] = sum;
          global<float>(p.logits)[i * (p.M + p.N) + p.M + expert] = sum;
        }
      }
      __syncthreads();
      const int64_t at = (i * b + b - 1) * p.K;
      if (thread == 0) {
        choose(scratch, static_cast<int>(p.N), static_cast<int>(p.K), global<int>(p.routes) + at,
               global<float>(p.gates) + at);
      }
    }
    return;
  }
  const int64_t item = blockIdx.x - instances, E = p.M + p.N, expert = item % E;
  const int64_t begin = item / E * limits::kPrepareOutputs, end = min(p.k, begin + limits::kPrepareOutputs);
  const bool vu = expert < p.M;
  add_w_part<T, kThreads>(p, vu ? p.vu_B : p.if_B, vu ? p.vu_importance : p.if_importance, p.k,
                          vu ? expert : expert - p.M, begin, end, scratch, global<float>(p.w_part) + item * p.r);
}

// Grid (n, slices of d): the mean of an instance's routed tokens over a slice, and its part of the logits; the last
// slice to be ready adds the parts in their order and chooses. Four groups of threads share the tiles, which they count
// from the first routed token.
__global__ void __launch_bounds__(kRouteThreads, 1) route_kernel(RouteShrink p) {
  constexpr int GROUPS = 4, LANES = kRouteThreads / GROUPS, COLUMNS = kRouteThreads / LANES;
  static_assert(limits::kRouteInputs == kRouteThreads);
  Arena arena;
  auto group_sums = arena.take<float>(GROUPS * kRouteThreads);
  auto scratch = arena.take<float>(kRouteThreads / 32);
  auto z = arena.take<float>(static_cast<int>(p.M));
  auto last = arena.take<int>(1);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t i = blockIdx.x, slice = blockIdx.y, slices = gridDim.y, c0 = slice * limits::kRouteInputs;
  const auto cu = global<const int>(p.cu);
  const bool packed = p.cu != nullptr;
  const int64_t S = p.T / p.n, length = packed ? cu[i + 1] - cu[i] : S;
  const auto routed = global<const int64_t>(p.routed);
  const int64_t base = tile_base(i, cu, packed, S, limits::kTile, p.mask != nullptr ? 2 : 1);
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
  for (int64_t expert = 0; expert < p.M; ++expert) {
    const float term = warp_sum(c < p.d ? mean * weight_at(p.vu_router, expert * p.d + c) : 0.0f);
    if (lane == 0) scratch[warp] = term;
    __syncthreads();
    if (thread == 0) {
      float total = 0;
      for (int w = 0; w < kRouteThreads / 32; ++w) total += scratch[w];
      z_part[(i * slices + slice) * p.M + expert] = total;
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
  for (int64_t expert = thread; expert < p.M; expert += kRouteThreads) {
    float sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += z_part[(i * slices + s) * p.M + expert];
    z[expert] = sum;
    global<float>(p.logits)[i * (p.M + p.N) + expert] = sum;
  }
  __syncthreads();
  const int64_t at = i * (p.use_vu + p.use_if) * p.K;
  if (thread == 0) {
    choose(z, static_cast<int>(p.M), static_cast<int>(p.K), global<int>(p.routes) + at, global<float>(p.gates) + at);
  }
}

// A thread has an element of h, or one of w.
__global__ void __launch_bounds__(kThreads, 1) finish_kernel(RouteShrink p) {
  const int b = static_cast<int>(p.use_vu + p.use_if), K = static_cast<int>(p.K), r = static_cast<int>(p.r);
  const int64_t columns = b * K * r, size = p.T * columns;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    const int RP = rank_columns(r);
    const Units units(p, p.one_pass ? p.M : K);
    const int64_t token = i / columns;
    const int column = static_cast<int>(i - token * columns), branch = column / (K * r), slot = column / r % K;
    const int rank = column % r;
    int64_t source = slot * RP + rank;
    if (branch == b - 1 && p.use_if) {
      source += units.vu * 16;
    } else if (p.one_pass) {
      const int instance = instance_of(token, global<const int>(p.cu), p.cu != nullptr, p.n, p.T / p.n);
      source = global<const int>(p.routes)[(instance * b + branch) * K + slot] * RP + rank;
    }
    float sum = 0;
    for (int64_t s = 0; s < p.splits; ++s) {
      sum += global<const float>(p.part)[(s * p.T + token) * units.total * 16 + source];
    }
    global<float>(p.h)[i] = sum * (256.0f / static_cast<float>(256 - p.threshold));
    return;
  }
  i -= size;
  if (p.adaptive && i < (p.M + p.N) * r) {
    float sum = 0;
    const int64_t parts = cdiv(p.k, limits::kPrepareOutputs);
    for (int64_t part = 0; part < parts; ++part) sum += global<const float>(p.w_part)[part * (p.M + p.N) * r + i];
    global<float>(p.w)[i] = sum;
  }
}

template <class T, int UNITS>
void launch_shrink(const Shrink& p) {
  static_assert(kShrinkShared<T, UNITS> <= limits::kSharedMemory);
  const int64_t tiles = tile_count(p, limits::kTile, p.sums != nullptr && p.mask != nullptr ? 2 : 1);
  const int64_t blocks = p.multiplies ? cdiv(Units(p, p.vu_slots).total, UNITS) : 1;
  launch("shrink", shrink_kernel<T, UNITS>,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.splits), static_cast<unsigned>(blocks)),
         kShrinkThreads, kShrinkShared<T, UNITS>, p.stream, false, p);
}

}  // namespace

void shrink(const Shrink& p, int64_t columns) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (columns) {
      case 32: return launch_shrink<T, 2>(p);
      case 80: return launch_shrink<T, 5>(p);
      default: return launch_shrink<T, sizeof(T) == 2 ? 8 : 5>(p);  // in float32, 128 would spill
    }
  });
}

void route_shrink(const RouteShrink& p) {
  use_device(static_cast<int>(p.device));
  const bool route_vu = p.route && p.use_vu;
  const int64_t RP = rank_columns(p.r), width = cdiv(p.d, 8) * 8;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t items = (p.route ? p.n : 0) + (p.adaptive ? (p.M + p.N) * cdiv(p.k, limits::kPrepareOutputs) : 0);
    const size_t shared = std::max<size_t>(4 * kThreads, p.N) * 4 + 16 + 16 * kThreads;
    launch("prepare", prepare_kernel<T>, dim3(static_cast<unsigned>(items)), kThreads, shared, p.stream, false, p);
    pack<T>(p, {{p.vu_A, p.if_A}, {p.vu_packed, p.if_packed}, {p.M, p.N}, p.r, p.d, RP, width}, false);
  });
  Shrink s;
  static_cast<Layout&>(s) = p;
  s.s = p.x, s.L = p.d, s.width = width;
  s.weights = {p.vu_packed != nullptr ? p.vu_packed : p.vu_A.data, p.if_packed != nullptr ? p.if_packed : p.if_A.data,
               RP * width, width};
  s.routes = p.routes;
  s.part = p.part;
  if (route_vu) {
    Shrink sum = s;
    sum.multiplies = sum.all = p.one_pass;
    sum.vu_slots = p.M;
    sum.splits = p.one_pass ? p.splits : p.sum_splits;
    sum.sums = p.sums;
    sum.mask = p.mask;
    sum.routed = p.routed;
    shrink(sum, p.one_pass ? p.columns : 32);
    const size_t shared = 4 * (4 * kRouteThreads + kRouteThreads / 32) + cdiv(p.M * 4, 16) * 16 + 16;
    launch("route", route_kernel,
           dim3(static_cast<unsigned>(p.n), static_cast<unsigned>(cdiv(p.d, limits::kRouteInputs))), kRouteThreads,
           shared, p.stream, false, p);
  }
  if (!p.one_pass) {
    s.vu_slots = p.K;
    s.splits = p.splits;
    shrink(s, p.columns);
  }
  const int64_t elements = p.T * (p.use_vu + p.use_if) * p.K * p.r + (p.adaptive ? (p.M + p.N) * p.r : 0);
  launch("finish", finish_kernel, dim3(static_cast<unsigned>(cdiv(elements, kThreads))), kThreads, 0, p.stream, false,
         p);
}
