// One token an instance, in one launch for all projections of an input: y += the adapter's output.
//
// Each projection has blocks of its own. Before the grid's barrier they share out what reads weights alone: A x of the
// experts somebody uses, router logits, and w = s B^T I, each in parts over slices of d or of k. After it, blocks that
// own a slice of k add the parts up for all instances, choose, mix and expand. All sums run in an order that neither the
// number of blocks nor the other projections change. There is little to compute, so what counts is how often a thread
// waits for memory: loads that do not depend on each other leave together, whatever their number.

#include "common.cuh"
#include "grid.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = limits::kDecodeInputs;  // 32 lanes of kVectors vectors of 4
constexpr int kVectors = kSlice / 128;
constexpr int kTogether = 4;  // instances that a row of A is multiplied with at a time
constexpr int kLoads = 8;     // of a thread, on their way together
constexpr int kSums = 256;    // numbers of w that a block adds up at a time

struct Projections {
  Decode of[limits::kDecodeProjections];
  int first_block[limits::kDecodeProjections + 1] = {};  // of each one, then the number of blocks
};

static_assert(sizeof(Projections) <= 4096);  // what every driver takes for a kernel's arguments

struct Sizes {
  int K, r, M, N, n, E, slots;
  int padded, columns;  // a slot's numbers in rank space, up to a multiple of 4, and those of all slots
  int masks;            // pairs of a slot and an expert of its branch
  int group;            // instances that are mixed at a time
  int outputs;          // of a slice of k
  __host__ __device__ explicit Sizes(const Decode& p)
      : K(static_cast<int>(p.K)), r(static_cast<int>(p.r)), M(static_cast<int>(p.M)), N(static_cast<int>(p.N)),
        n(static_cast<int>(p.n)), E(M + N), slots(static_cast<int>(p.use_vu + p.use_if) * K),
        padded((r + 3) / 4 * 4), columns(slots * padded), outputs(static_cast<int>(p.outputs)) {
    masks = static_cast<int>(p.use_vu) * K * M + static_cast<int>(p.use_if) * K * N;
    const int fit = limits::kDecodeMixed / (columns + outputs);
    group = fit < 1 ? 1 : fit < n ? fit : n;
  }
  // What a projection's blocks share out: slices of k, then rows of A and of the router by slices of d, then logits of
  // the IF router. Of `rows` of A only those of experts in use count, which the device alone knows.
  __host__ __device__ int64_t k_slices(const Decode& p) const { return cdiv(p.k, outputs); }
  __host__ __device__ int64_t dots(const Decode& p, int64_t rows) const {
    return cdiv(rows + (p.route && p.use_vu ? M : 0), kWarps) * cdiv(p.d, kSlice);
  }
  __host__ __device__ int64_t logits(const Decode& p) const {
    return p.route && p.use_if ? cdiv(p.n * p.N, kWarps) : 0;
  }
};

// count numbers, `stride` apart, added up in their order.
__device__ __forceinline__ float strided_sum(Ptr<const float> from, int64_t count, int64_t stride) {
  float sum = 0;
  for (int64_t i = 0; i < count; i += kLoads) {
    float v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = i + j < count ? from[(i + j) * stride] : 0.0f;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum += v[j];
  }
  return sum;
}

// A warp's product of one row of A, or of the router, with a slice of every token that needs it, to out[i * stride].
template <class T, class W>
__device__ __forceinline__ void dot_item(const Decode& p, Ptr<const W> weight, bool weight_aligned, int64_t row,
                                         bool router, int64_t slice, uint64_t here, int lane, Ptr<float> out,
                                         int64_t stride) {
  const bool aligned = p.d % 4 == 0 && is_aligned(p.x, 16);
  const auto x = global<const T>(p.x);
  W a[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = slice * kSlice + v * 128 + lane * 4;
    take_four(a[v], weight, row * p.d + c, p.d - c, weight_aligned && p.d % 4 == 0);
  }
  while (here != 0) {
    int at[kTogether], many = 0;
    T t[kTogether][kVectors][4];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      at[j] = 0;
      if (here == 0) continue;
      at[j] = __ffsll(static_cast<long long>(here)) - 1;
      here &= here - 1, ++many;
      const bool seen = !router || p.mask == nullptr || global<const uint8_t>(p.mask)[at[j]];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = slice * kSlice + v * 128 + lane * 4;
        take_four(t[j][v], x, at[j] * p.d + c, seen ? p.d - c : 0, aligned);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (j >= many) continue;
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight_value = to_float(a[v][i]);
          sum += (router ? weight_value : rounded<T>(weight_value)) * to_float(t[j][v][i]);
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) out[at[j] * stride] = sum;
    }
  }
}

// A block's part of w = s B^T I, for `used` experts of a list, over a slice of k; `importance` has that slice of both.
template <class T, class W>
__device__ __forceinline__ void add_w(const Decode& p, const Sizes& s, Ptr<const int> list, int used,
                                      int64_t first_output, int outputs, Ptr<const float> importance,
                                      Ptr<float> scratch, Ptr<float> out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = s.r;
  int quads = 1;  // threads that share a row: a power of two, 4 ranks each
  while (quads * 4 < r) quads *= 2;
  const int rows = kThreads / quads, quad = threadIdx.x % quads, first = threadIdx.x / quads;
  const int steps = static_cast<int>(cdiv(s.outputs, rows)), at_a_time = kSums / r;
  const bool aligned = r % 4 == 0 && is_aligned(p.vu_B.data, 16) && is_aligned(p.if_B.data, 16);
  for (int base = 0; base < used; base += at_a_time) {
    const int count = min(used - base, at_a_time);
    float sum[4] = {0, 0, 0, 0};
    int loaded = 0, load_step = 0, added = 0, add_step = 0;  // experts, and steps of the next one
    for (int left = count * steps; left > 0; left -= kLoads) {
      W v[kLoads][4];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int expert = list[base + min(loaded, count - 1)], row = load_step * rows + first;
        const int64_t source = expert < s.M ? expert : expert - s.M;
        take_four(v[j], global<const W>(expert < s.M ? p.vu_B.data : p.if_B.data),
                  (source * p.k + first_output + row) * r + quad * 4, j < left && row < outputs ? r - quad * 4 : 0,
                  aligned);
        if (++load_step == steps) load_step = 0, ++loaded;
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (j >= left) continue;
        const int row = add_step * rows + first;
        if (row < outputs) {
          const float here = importance[(list[base + added] < s.M ? 0 : s.outputs) + row];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += rounded<T>(to_float(v[j][i])) * here;
        }
        if (++add_step < steps) continue;
        for (int lanes = 16; lanes >= quads; lanes /= 2) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += shuffle_xor(sum[i], lanes);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (lane < quads && quad * 4 + i < r) scratch[warp * kSums + added * r + quad * 4 + i] = sum[i];
          sum[i] = 0;
        }
        add_step = 0, ++added;
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count * r; c += kThreads) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += scratch[i * kSums + c];
      out[list[base + c / r] * r + c % r] = static_cast<float>(p.scaling) * total;
    }
    __syncthreads();
  }
}

// y of one output for the instances of `taken` (bits from `begin` on), += a slot's share of it; y is y[g * outputs].
template <class T, class W>
__device__ __forceinline__ void expand_slot(const Decode& p, const Sizes& s, Ptr<const W> B, bool B_aligned,
                                            int experts, int64_t output, Ptr<const uint64_t> masks, int64_t begin,
                                            uint64_t taken, Ptr<const float> u, Ptr<float> y) {
  const bool aligned = s.r % 4 == 0 && B_aligned;
  for (int e = 0; e < experts; ++e) {
    const uint64_t users = masks[e] >> begin & taken;
    if (users == 0) continue;
    for (int rank = 0; rank < s.r; rank += 16) {
      W v[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        take_four(v[j], B, (e * p.k + output) * s.r + rank + j * 4, s.r - rank - j * 4, aligned);
      }
      for (uint64_t left = users; left != 0; left &= left - 1) {
        const int g = __ffsll(static_cast<long long>(left)) - 1;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (rank + j * 4 >= s.r) continue;
          const float4 with = *view<const float4>(u + (g * s.columns + rank + j * 4));
          sum += rounded<T>(to_float(v[j][0])) * with.x + rounded<T>(to_float(v[j][1])) * with.y;
          sum += rounded<T>(to_float(v[j][2])) * with.z + rounded<T>(to_float(v[j][3])) * with.w;
        }
        y[g * s.outputs] += sum;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ Projections all) {
  int mine = 0;  // the block's projection
  while (static_cast<int>(blockIdx.x) >= all.first_block[mine + 1]) ++mine;
  const Decode& p = all.of[mine];
  const int block = blockIdx.x - all.first_block[mine], blocks = all.first_block[mine + 1] - all.first_block[mine];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sizes s(p);
  const int vu_slots = static_cast<int>(p.use_vu) * s.K;
  Arena arena;
  auto masks = arena.take<uint64_t>(s.masks);  // of each slot and expert, who uses it: instances as bits
  auto users = arena.take<uint64_t>(s.E);      // of each expert
  auto list = arena.take<int>(s.E);            // experts in use
  auto used_count = arena.take<int>(2);        // of the VU branch, and of both
  auto routes = arena.take<int>(s.n * s.slots);
  auto gates = arena.take<float>(s.n * s.slots);
  auto importance = arena.take<float>(2 * s.outputs);
  auto scratch = arena.take<float>(kWarps * kSums);
  auto w = arena.take<float>(s.E * s.r);
  auto z = arena.take<float>(kWarps * s.E);
  auto u = arena.take<float>(s.group * s.columns);
  auto sums = arena.take<float>(s.group * s.outputs);

  const auto find_masks = [&] {  // of routes; a warp a pair
    for (int pair = warp; pair < s.masks; pair += kWarps) {
      const bool vu = pair < vu_slots * s.M;
      const int other = pair - vu_slots * s.M, slot = vu ? pair / s.M : vu_slots + other / s.N;
      const int expert = vu ? pair % s.M : other % s.N;
      uint64_t mask = 0;
      for (int i = 0; i < s.n; i += 32) {
        const bool uses = i + lane < s.n && routes[min(i + lane, s.n - 1) * s.slots + slot] == expert;
        mask |= static_cast<uint64_t>(ballot(uses)) << i;
      }
      if (lane == 0) masks[pair] = mask;
    }
  };
  const auto take_importance = [&](int64_t first, int outputs) {
    for (int o = threadIdx.x; o < outputs; o += kThreads) {
      importance[o] = rounded<T>(weight_at(p.vu_importance, first + o));
      importance[s.outputs + o] = rounded<T>(weight_at(p.if_importance, first + o));
    }
  };
  const auto outputs_of = [&](int64_t slice) {
    return static_cast<int>(min(static_cast<int64_t>(s.outputs), p.k - slice * s.outputs));
  };

  const int64_t k_slices = s.k_slices(p), d_slices = cdiv(p.d, kSlice);
  if (p.adaptive && block < k_slices) take_importance(block * static_cast<int64_t>(s.outputs), outputs_of(block));
  if (!p.route) {
    for (int j = threadIdx.x; j < s.n * s.slots; j += kThreads) {
      routes[j] = global<const int>(p.given_routes)[j];
      gates[j] = global<const float>(p.given_gates)[j];
    }
    __syncthreads();
    find_masks();
    __syncthreads();
  }
  if (warp == 0) {  // all may be in use where they are routed here
    int count = 0, count_vu = 0;
    for (int base = 0; base < s.E; base += 32) {
      const int e = base + lane;
      uint64_t mask = 0;
      if (e < s.M && p.use_vu) {
        for (int j = 0; j < s.K; ++j) mask |= p.route ? ~0ull : masks[j * s.M + e];
      } else if (e >= s.M && e < s.E && p.use_if) {
        for (int j = 0; j < s.K; ++j) mask |= p.route ? ~0ull : masks[vu_slots * s.M + j * s.N + e - s.M];
      }
      const uint32_t in_use = ballot(mask != 0), before = (1u << lane) - 1;
      if (mask != 0) list[count + __popc(in_use & before)] = e;
      if (e < s.E) users[e] = mask;
      count += __popc(in_use);
      count_vu += __popc(ballot(mask != 0 && e < s.M));
    }
    if (lane == 0) used_count[0] = count_vu, used_count[1] = count;
  }
  __syncthreads();
  const int used = used_count[1], used_vu = used_count[0];
  const uint64_t everyone = ~0ull >> (64 - s.n);

  const int64_t rows = static_cast<int64_t>(used) * s.r, dots = s.dots(p, rows);
  for (int64_t item = block; item < k_slices + dots + s.logits(p); item += blocks) {
    if (item < k_slices) {
      if (!p.adaptive) continue;
      const int64_t first = item * s.outputs;
      const int outputs = outputs_of(item);
      if (item != block) {
        take_importance(first, outputs);
        __syncthreads();
      }
      const auto out = global<float>(p.w_part) + item * s.E * s.r;
      const int alike = p.vu_B.dtype == p.if_B.dtype ? used : used_vu;  // experts of one dtype are read together
      with_weight(p.vu_B.dtype, [&](auto zero) {
        add_w<T, decltype(zero)>(p, s, list, alike, first, outputs, importance, scratch, out);
      });
      if (alike == used) continue;
      with_weight(p.if_B.dtype, [&](auto zero) {
        add_w<T, decltype(zero)>(p, s, list + alike, used - alike, first, outputs, importance, scratch, out);
      });
    } else if (item < k_slices + dots) {
      const int64_t row = (item - k_slices) / d_slices * kWarps + warp, slice = (item - k_slices) % d_slices;
      const bool router = row >= rows;
      if (router && (!p.route || !p.use_vu || row - rows >= s.M)) continue;
      const int expert = router ? 0 : list[row / s.r];
      const bool vu = router || expert < s.M;
      const Weight& weight = router ? p.vu_router : vu ? p.vu_A : p.if_A;
      const int64_t source = router ? row - rows : (vu ? expert : expert - s.M) * static_cast<int64_t>(s.r) + row % s.r;
      const auto out = router ? global<float>(p.z_part) + (slice * p.n * p.M + source)
                              : global<float>(p.h_part) + (slice * p.n * s.E + expert) * s.r + row % s.r;
      with_weight(weight.dtype, [&](auto zero) {
        dot_item<T>(p, global<const decltype(zero)>(weight.data), is_aligned(weight.data, 16), source, router, slice,
                    router ? everyone : users[expert] & everyone, lane, out, router ? s.M : s.E * s.r);
      });
    } else {  // a warp an instance and IF expert
      const int64_t pair = (item - k_slices - dots) * kWarps + warp;
      if (pair >= p.n * p.N) continue;
      const float sum = warp_dot(p.if_router, pair % p.N * p.e, p.instruction, pair / p.N * p.e, p.e);
      if (lane == 0) global<float>(p.z_if)[pair] = sum;
    }
  }
  grid_barrier();
  if (block >= k_slices) return;

  if (p.adaptive) {  // each warp adds up every eighth part
    const int numbers = used * s.r;
    for (int base = 0; base < numbers; base += kSums) {
      const int count = min(numbers - base, kSums);
      for (int c = lane; c < count; c += 32) {
        const int at = list[(base + c) / s.r] * s.r + (base + c) % s.r;
        const auto from = global<const float>(p.w_part) + (warp * static_cast<int64_t>(s.E) * s.r + at);
        scratch[warp * kSums + c] = strided_sum(from, cdiv(k_slices - warp, kWarps), kWarps * s.E * s.r);
      }
      __syncthreads();
      for (int c = threadIdx.x; c < count; c += kThreads) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += scratch[i * kSums + c];
        w[list[(base + c) / s.r] * s.r + (base + c) % s.r] = sum;
      }
      __syncthreads();
    }
  }
  if (p.route) {  // a warp an instance
    for (int i = warp; i < s.n; i += kWarps) {
      auto logits = z + warp * s.E;
      for (int e = lane; e < s.E; e += 32) {
        float sum = 0;
        if (e < s.M && p.use_vu) {
          sum = strided_sum(global<const float>(p.z_part) + (i * p.M + e), d_slices, p.n * p.M);
        } else if (e >= s.M && p.use_if) {
          sum = global<const float>(p.z_if)[i * p.N + e - s.M];
        }
        logits[e] = sum;
        if (block == 0) global<float>(p.logits)[i * static_cast<int64_t>(s.E) + e] = sum;
      }
      __syncwarp();
      if (lane == 0 && p.use_vu) choose(logits, s.M, s.K, routes + i * s.slots, gates + i * s.slots);
      if (lane == 0 && p.use_if) {
        choose(logits + s.M, s.N, s.K, routes + (i * s.slots + vu_slots), gates + (i * s.slots + vu_slots));
      }
      __syncwarp();  // the next instance's logits take the place of these
    }
    __syncthreads();
    find_masks();
  }
  if (block == 0) {
    for (int j = threadIdx.x; j < s.n * s.slots; j += kThreads) {
      global<int>(p.routes)[j] = routes[j];
      global<float>(p.gates)[j] = gates[j];
    }
  }
  // threads have an output each, and where there are more threads than outputs, instances in turn
  const int span = min(s.outputs, kThreads), sets = kThreads / span, set = threadIdx.x / span;
  const auto y = global<T>(p.y);
  for (int64_t begin = 0; begin < s.n; begin += s.group) {
    const int count = static_cast<int>(min(static_cast<int64_t>(s.group), s.n - begin));
    for (int item = threadIdx.x; item < count * s.columns; item += kThreads) {  // h
      const int g = item / s.columns, slot = item % s.columns / s.padded, rank = item % s.padded;
      const int64_t i = begin + g, expert = routes[i * s.slots + slot] + (slot < vu_slots ? 0 : s.M);
      const auto part = global<const float>(p.h_part) + ((i * s.E + expert) * s.r + rank);
      u[item] = rank < s.r ? strided_sum(part, d_slices, p.n * s.E * s.r) : 0.0f;
    }
    __syncthreads();
    for (int g = warp; g < count; g += kWarps) {  // a warp an instance: mix
      const int64_t i = begin + g;
      float lead = 0;
      if (p.adaptive) {
        for (int c = lane; c < s.columns; c += 32) {
          const int slot = c / s.padded, rank = c % s.padded;
          if (rank >= s.r) continue;
          const bool vu = slot < vu_slots;
          const int expert = routes[i * s.slots + slot] + (vu ? 0 : s.M);
          const float score = gates[i * s.slots + slot] * w[expert * s.r + rank] * u[g * s.columns + c];
          lead += vu ? score : -score;
        }
      }
      lead = p.adaptive ? warp_sum(lead) : static_cast<float>(p.fixed_lead);
      if (block == 0 && lane == 0) global<float>(p.lead)[i] = lead;
      for (int c = lane; c < s.columns; c += 32) {
        const int slot = c / s.padded;
        const float share = sigmoid(slot < vu_slots ? lead : -lead);
        u[g * s.columns + c] = u[g * s.columns + c] * (static_cast<float>(p.scaling) * share * gates[i * s.slots + slot]);
      }
    }
    __syncthreads();
    const uint64_t in_set = ~0ull / ((1ull << sets) - 1) << set;
    const uint64_t taken = in_set & ~0ull >> (64 - count);
    for (int64_t slice = block; slice < k_slices && set < sets; slice += blocks) {
      const int outputs = outputs_of(slice);
      for (int o = threadIdx.x % span; o < outputs; o += span) {
        const int64_t output = slice * s.outputs + o;
        for (int g = set; g < count; g += sets) {
          sums[g * s.outputs + o] = p.add ? to_float(y[(begin + g) * p.k + output]) : 0.0f;
        }
        for (int slot = 0; slot < s.slots; ++slot) {
          const bool vu = slot < vu_slots;
          const Weight& B = vu ? p.vu_B : p.if_B;
          const auto users_of = masks + (vu ? slot * s.M : vu_slots * s.M + (slot - vu_slots) * s.N);
          with_weight(B.dtype, [&](auto zero) {
            expand_slot<T>(p, s, global<const decltype(zero)>(B.data), is_aligned(B.data, 16), vu ? s.M : s.N, output,
                           users_of, begin, taken, u + slot * s.padded, sums + o);
          });
        }
        for (int g = set; g < count; g += sets) {
          y[(begin + g) * p.k + output] = from_float<T>(sums[g * s.outputs + o]);
        }
      }
    }
    __syncthreads();
  }
}

size_t shared_bytes(const Decode& p) {
  const Sizes s(p);
  const int64_t sizes[] = {2 * s.masks, 2 * s.E, s.E, 2, s.n * s.slots, s.n * s.slots, 2 * s.outputs, kWarps * kSums,
                           s.E * s.r, kWarps * s.E, s.group * s.columns, s.group * s.outputs};
  size_t bytes = 0;
  for (int64_t size : sizes) bytes += cdiv(size * 4, 16) * 16;
  return bytes;
}

}  // namespace

void decode(const Decode* projections, int count) {
  if (count < 1 || count > limits::kDecodeProjections) {
    throw std::invalid_argument("decode takes 1 to " + std::to_string(limits::kDecodeProjections) +
                                " projections, got " + std::to_string(count));
  }
  const Decode& first = projections[0];
  use_device(static_cast<int>(first.device));
  with_dtype(first.dtype, [&](auto zero) {
    const auto kernel = decode_kernel<decltype(zero)>;
    Projections all;
    size_t shared = 0;
    int64_t wanted[limits::kDecodeProjections], total = 0;
    for (int i = 0; i < count; ++i) {
      const Decode& p = all.of[i] = projections[i];
      const Sizes s(p);
      shared = std::max(shared, shared_bytes(p));
      wanted[i] = s.k_slices(p) + s.dots(p, (p.use_vu * p.M + p.use_if * p.N) * p.r) + s.logits(p);
      total += wanted[i];
    }
    const int64_t blocks = std::min<int64_t>(resident_blocks("decode", kernel, kThreads, shared), total);
    if (blocks < count) throw std::runtime_error("decode: the device has no room for a block a projection at a time");
    for (int i = 0; i < count; ++i) {  // a block each, and of the others as many as it has of the work that is left
      const int64_t more = total > count ? (blocks - count) * (wanted[i] - 1) / (total - count) : 0;
      all.first_block[i + 1] = all.first_block[i] + static_cast<int>(1 + more);
    }
    launch("decode", kernel, dim3(static_cast<unsigned>(all.first_block[count])), kThreads, shared, first.stream, true,
           all);
  });
}
