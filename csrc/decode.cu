// One token a sequence, for all projections of an input:
//
//   decode_kernel  y += the mixture's output
//
// decode.cuh has the sizes that the work is cut by, and the products with one row of a weight.
//
// Each projection has blocks of its own. First they share the work that reads x and weights alone: A x of the experts in
// use, router logits, and w = s B^T I, each in parts over slices of d or of k. When all of it is done, a block has a
// slice of k for a group of sequences: it adds their parts up, chooses, mixes and expands. A launch does both, with the
// grid's barrier in between, or one: the first half does not need y, so it may run beside the base's product. All sums
// run in an order that depends neither on the number of blocks nor on the other projections. There is little to compute
// and much to wait for, so independent loads are issued back to back to overlap their latency.

#include "decode.cuh"
#include "grid.cuh"

namespace {

struct Projections {
  Decode of[limits::kDecodeProjections];
  int first_block[limits::kDecodeProjections + 1] = {};  // of each one, then the number of blocks
};

static_assert(sizeof(Projections) <= 4096);  // what every driver takes for a kernel's arguments

// A block of a projection, and what it has in shared memory.
template <class Scalar, bool WIDE>
struct Block {
  const Decode& p;
  const Sizes s;
  const int block, blocks;  // its number among the projection's
  const int warp, lane;
  Ptr<uint64_t> masks;  // of each slot and expert, who uses it there: sequences as bits
  Ptr<uint64_t> users;  // of each expert
  Ptr<int> list;        // experts in use
  Ptr<int> used;        // how many these are
  Ptr<int> ids;         // of all sequences, and the slots' weights
  Ptr<float> weights;
  Ptr<float> scratch, w;
  Ptr<float> logits;  // of a warp's sequence
  Ptr<float> u, sums;  // h, then what B is multiplied with; y

  __device__ __forceinline__ Block(const Decode& p_, int block_, int blocks_)
      : p(p_), s(p_), block(block_), blocks(blocks_), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    SmemAllocator smem;
    masks = smem.take<uint64_t>(s.masks);
    users = smem.take<uint64_t>(s.E);
    list = smem.take<int>(s.E);
    used = smem.take<int>(1);
    ids = smem.take<int>(s.n * s.slots);
    weights = smem.take<float>(s.n * s.slots);
    scratch = smem.take<float>(kWarps * kSums);
    w = smem.take<float>(s.weights);
    logits = smem.take<float>(kWarps * s.E) + warp * s.E;
    u = smem.take<float>(s.group * s.columns);
    sums = smem.take<float>(s.group * s.outputs);
  }

  __device__ __forceinline__ int outputs_of(int slice) const {
    return static_cast<int>(min(static_cast<int64_t>(s.outputs), p.k - slice * static_cast<int64_t>(s.outputs)));
  }

  // The masks of the ids of some sequences; a warp a pair.
  __device__ __forceinline__ void find_masks(int begin, int end) const {
    for (int pair = warp; pair < s.masks; pair += kWarps) {
      const bool second = pair >= s.K * s.E0;
      const int experts = second ? s.E - s.E0 : s.E0, of_bank = second ? pair - s.K * s.E0 : pair;
      const int slot = (second ? s.K : 0) + of_bank / experts, expert = of_bank % experts;
      uint64_t mask = 0;
      for (int i = begin; i < end; i += 32) {
        const bool uses = i + lane < end && ids[min(i + lane, end - 1) * s.slots + slot] == expert;
        mask |= static_cast<uint64_t>(lanes_where(uses)) << i;
      }
      if (lane == 0) masks[pair] = mask;
    }
  }

  // Users of each expert, and the list of those that have any; one warp. Where they are routed here all may be in use.
  __device__ __forceinline__ void find_users() const {
    int count = 0;
    for (int base = 0; base < s.E; base += 32) {
      const int e = base + lane;
      const bool second = e >= s.E0;
      uint64_t mask = 0;
      if (e < s.E) {
        const auto first = masks + (second ? s.K * s.E0 + e - s.E0 : e);
        for (int j = 0; j < s.K; ++j) mask |= p.routes ? everybody() : first[j * (second ? s.E - s.E0 : s.E0)];
      }
      const uint32_t in_use = lanes_where(mask != 0);
      if (mask != 0) list[count + __popc(in_use & ((1u << lane) - 1))] = e;
      if (e < s.E) users[e] = mask;
      count += __popc(in_use);
    }
    if (lane == 0) *used = count;
  }

  __device__ __forceinline__ uint64_t everybody() const { return ~0ull >> (64 - s.n); }

  // Rows of A that h is made of.
  __device__ __forceinline__ int down_rows() const { return (p.shared ? s.downs : *used) * s.r; }

  // A slice of k: its part of w.
  __device__ __forceinline__ void k_item(int slice) const {
    with_reader<WIDE>(p.banks[0].B, [&](auto B) {
      add_w<Scalar>(p, s, B, list, *used, slice * static_cast<int64_t>(s.outputs), outputs_of(slice), scratch,
                    global<float>(p.w_part) + slice * static_cast<int64_t>(s.E * s.r));
    });
  }

  // Rows of A and of the routers of x, one a warp, by a slice of d.
  __device__ __forceinline__ void d_item(int item) const {
    const int rows = down_rows(), row = item / s.d_slices * kWarps + warp, slice = item % s.d_slices;
    const bool router = row >= rows;
    if (router && row - rows >= s.x_rows) return;
    const int rank = row % s.r;
    const int down = router ? s.first_x + row - rows  // an expert's number
                            : p.shared ? row / s.r : list[row / s.r];
    const bool second = router || !p.shared ? down >= s.E0 : down >= 1;
    const Weight& weight = router ? (second ? p.banks[1].router : p.banks[0].router)
                                  : (second ? p.banks[1].A : p.banks[0].A);
    const int in_bank = p.shared && !router ? 0 : second ? down - s.E0 : down;
    const int source = router ? in_bank : in_bank * s.r + rank;
    const int64_t numbers = static_cast<int64_t>(s.n) * s.downs;
    const auto out = router ? global<float>(p.z_part) + (slice * s.n * s.E + down)
                            : global<float>(p.h_part) + ((slice * numbers + down) * s.r + rank);
    with_reader<WIDE>(weight, [&](auto reader) {
      dot_item<Scalar, WIDE>(p, reader, source * p.d + slice * kSlice, router, slice,
                             router || p.shared ? everybody() : users[down], lane, out, router ? s.E : s.downs * s.r);
    });
  }

  // Logits of routers of the instruction, one a warp.
  __device__ __forceinline__ void logit_item(int item) const {
    const int pair = item * kWarps + warp;
    if (pair >= s.n * s.e_rows) return;
    const int expert = s.first_e + pair % s.e_rows, i = pair / s.e_rows;
    const bool second = expert >= s.E0;
    const float sum = warp_dot(second ? p.banks[1].router : p.banks[0].router, (second ? expert - s.E0 : expert) * p.e,
                               p.instruction, i * p.e, p.e);
    if (lane == 0) global<float>(p.z)[i * s.E + expert] = sum;
  }

  // What both halves need: ids and weights where they are given, and who uses which expert.
  __device__ __forceinline__ void find_experts() const {
    if (!p.routes) {
      for (int j = threadIdx.x; j < s.n * s.slots; j += kThreads) {
        ids[j] = p.ids == nullptr ? j % s.K : global<const int>(p.ids)[j];
        weights[j] = p.slot_weights == nullptr ? 1.0f : global<const float>(p.slot_weights)[j];
      }
      __syncthreads();
      find_masks(0, s.n);
      __syncthreads();
    }
    if (warp == 0) find_users();
    __syncthreads();
  }

  __device__ __forceinline__ void read_weights() const {
    const int dots = s.dots(down_rows()), items = s.w_items() + dots + s.logits();
    for (int item = block; item < items; item += blocks) {
      if (item < s.w_items()) {
        k_item(item);
      } else if (item < s.w_items() + dots) {
        d_item(item - s.w_items());
      } else {
        logit_item(item - s.w_items() - dots);
      }
    }
  }

  // w of experts in use; each warp adds up every eighth part.
  __device__ __forceinline__ void add_up_w() const {
    const int numbers = *used * s.r, stride = s.E * s.r;
    for (int base = 0; base < numbers; base += kSums) {
      const int count = min(numbers - base, kSums);
      for (int c = lane; c < count; c += 32) {
        const auto part = global<const float>(p.w_part) + (list[(base + c) / s.r] * s.r + (base + c) % s.r);
        scratch[warp * kSums + c] =
            strided_sum(part + warp * stride, (s.k_slices - warp + kWarps - 1) / kWarps, kWarps * stride);
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

  // Chooses the slots of some sequences; a warp a sequence. `writes`: the logits, too.
  __device__ __forceinline__ void route(int begin, int end, bool writes) const {
    for (int i = begin + warp; i < end; i += kWarps) {
      for (int e = lane; e < s.E; e += 32) {
        const bool reads_x = e >= s.E0 ? p.banks[1].router_reads_x : p.banks[0].router_reads_x;
        const float sum = reads_x ? strided_sum(global<const float>(p.z_part) + (i * s.E + e), s.d_slices, s.n * s.E)
                                  : global<const float>(p.z)[i * s.E + e];
        logits[e] = sum;
        if (writes) global<float>(p.logits)[i * s.E + e] = sum;
      }
      __syncwarp();
#pragma unroll 1  // or the registers of both would be taken
      for (int bank = 0; lane == 0 && bank < p.b; ++bank) {
        const int at = i * s.slots + bank * s.K;
        choose(logits + bank * s.E0, bank ? s.E - s.E0 : s.E0, s.K, p.gate_all, ids + at, weights + at);
      }
      __syncwarp();  // the next sequence's logits take the place of these
    }
  }

  // u = c h of `count` sequences from `begin` on. `writes`: their scores, too.
  __device__ __forceinline__ void mix(int begin, int count, bool writes) const {
    for (int item = threadIdx.x; item < count * s.columns; item += kThreads) {  // h
      const int i = begin + item / s.columns, slot = item % s.columns / s.padded, rank = item % s.padded;
      const int id = ids[i * s.slots + slot], stride = s.downs * s.r, second = slot >= s.K;
      const int down = p.shared ? second : id + second * s.E0;
      const auto part = global<const float>(p.h_part) + (i * stride + down * s.r + rank);
      u[item] = rank < s.r && id >= 0 ? strided_sum(part, s.d_slices, s.n * stride) : 0.0f;
    }
    __syncthreads();
    with_mix(p.mix, [&](auto formulas) {
      using M = decltype(formulas);
      for (int g = warp; g < count; g += kWarps) {  // a warp a sequence
        const auto mine = u + g * s.columns;
        const auto my_ids = ids + (begin + g) * s.slots;
        const auto my_weights = weights + (begin + g) * s.slots;
        float score = 0;
        if constexpr (M::kScores) {
          for (int c = lane; c < s.columns; c += 32) {
            const int slot = c / s.padded, rank = c % s.padded, second = slot >= s.K;
            if (rank >= s.r) continue;
            const int expert = max(static_cast<int>(my_ids[slot]), 0) + second * s.E0;
            score += M::score_term(second, my_weights[slot], w[expert * s.r + rank], mine[c]);
          }
          score = warp_sum(score);
          if (writes && lane == 0) global<float>(p.scores)[begin + g] = score;
        }
        for (int c = lane; c < s.columns; c += 32) {
          const int slot = c / s.padded;
          mine[c] = mine[c] * (static_cast<float>(p.scaling) * M::coefficient(slot >= s.K, my_weights[slot], score));
        }
      }
    });
    __syncthreads();
  }

  // Calls f with each of this thread's outputs of an item, a slice of k for a group of sequences, and the sequences of
  // it that it has: all, or where there are more threads than outputs, every other, or fourth.
  template <class F>
  __device__ __forceinline__ void for_outputs(int item, F f) const {
    const int slice = item % s.k_slices, span = min(s.outputs, kThreads), sets = kThreads / span;
    const int set = threadIdx.x / span;
    if (set >= sets) return;
    for (int o = threadIdx.x % span; o < outputs_of(slice); o += span) {
      f(o, slice * static_cast<int64_t>(s.outputs) + o, set, sets);
    }
  }

  __device__ __forceinline__ void take_y(int item) const {
    const int begin = item / s.k_slices * s.group, count = min(s.group, s.n - begin);
    for_outputs(item, [&](int o, int64_t output, int set, int sets) {
      const auto y = global<const Scalar>(p.y) + (begin * p.k + output);
      for (int g = set; g < count; g += sets) sums[g * s.outputs + o] = p.add ? to_float(y[g * p.k]) : 0.0f;
    });
  }

  __device__ __forceinline__ void expand(int item) const {
    const int begin = item / s.k_slices * s.group, count = min(s.group, s.n - begin);
    for_outputs(item, [&](int o, int64_t output, int set, int sets) {
      const uint64_t taken = ~0ull / ((1ull << sets) - 1) << set & ~0ull >> (64 - count);
      for (int slot = 0; slot < s.slots; ++slot) {
        const bool second = slot >= s.K;
        const int experts = second ? s.E - s.E0 : s.E0;
        const auto users_of = masks + (second ? s.K * s.E0 + (slot - s.K) * experts : slot * experts);
        with_reader<WIDE>(second ? p.banks[1].B : p.banks[0].B, [&](auto B) {
          expand_slot<Scalar>(p, s, B, experts, output, users_of, begin, taken, u + slot * s.padded, sums + o);
        });
      }
      const auto y = global<Scalar>(p.y) + (begin * p.k + output);
      for (int g = set; g < count; g += sets) y[g * p.k] = from_float<Scalar>(sums[g * s.outputs + o]);
    });
  }

  __device__ __forceinline__ bool expands() const { return block < s.k_slices * s.groups; }

  __device__ __forceinline__ void write_y() const {
    if (s.weights > 0) add_up_w();
    int mixed = -1;
    for (int item = block; item < s.k_slices * s.groups; item += blocks) {
      const int begin = item / s.k_slices * s.group, end = min(begin + s.group, s.n);
      if (begin != mixed) {
        const bool writes = item % s.k_slices == 0;  // the first slice's block tells what was decided
        if (p.routes) {
          route(begin, end, writes);
          __syncthreads();
          find_masks(begin, end);
          for (int j = begin * s.slots + threadIdx.x; writes && j < end * s.slots; j += kThreads) {
            global<int>(p.routed_ids)[j] = ids[j];
            global<float>(p.routed_weights)[j] = weights[j];
          }
        }
        mix(begin, end - begin, writes);
        mixed = begin;
      }
      if (item != block) take_y(item);  // else it is there
      expand(item);
      __syncthreads();  // before the next group's masks and u
    }
  }
};

template <class Scalar, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE && sizeof(Scalar) == 2 ? 2 : 1)
    decode_kernel(const __grid_constant__ Projections all) {
  int mine = 0;  // the block's projection
  while (static_cast<int>(blockIdx.x) >= all.first_block[mine + 1]) ++mine;
  // every other projection counts its blocks from the last, so that the first ones, which have most to do, are on
  // multiprocessors of their own
  const int first = all.first_block[mine], end = all.first_block[mine + 1], at = blockIdx.x;
  const Block<Scalar, WIDE> block(all.of[mine], mine % 2 ? end - 1 - at : at - first, end - first);
  const int64_t half = block.p.half;
  block.find_experts();
  if (half != kSecondHalf) block.read_weights();
  if (half == kFirstHalf) return;
  if (block.expands()) block.take_y(block.block);
  if (half == kBothHalves) grid_barrier();
  if (block.expands()) block.write_y();
}

size_t shared_bytes(const Decode& p) {
  const Sizes s(p);
  const int64_t sizes[] = {2 * s.masks, 2 * s.E, s.E, 1, s.n * s.slots, s.n * s.slots, kWarps * kSums, s.weights,
                           kWarps * s.E, s.group * s.columns, s.group * s.outputs};
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
    const bool wide = std::all_of(projections, projections + count, is_wide);
    const auto kernel = wide ? decode_kernel<decltype(zero), true> : decode_kernel<decltype(zero), false>;
    Projections all;
    size_t shared = 0;
    int64_t wanted[limits::kDecodeProjections], total = 0;
    for (int i = 0; i < count; ++i) {
      const Decode& p = all.of[i] = projections[i];
      const Sizes s(p);
      shared = std::max(shared, shared_bytes(p));
      wanted[i] = first.half == kSecondHalf ? 0 : s.dots(s.downs * s.r) + s.logits();
      if (first.half == kFirstHalf) {
        wanted[i] += s.w_items();
      } else {
        wanted[i] += s.k_slices * s.groups;
      }
      total += wanted[i];
    }
    const int64_t blocks = std::min<int64_t>(resident_blocks("decode", kernel, kThreads, shared), total);
    if (blocks < count) throw std::runtime_error("decode: the device has no room for a block a projection at a time");
    for (int i = 0; i < count; ++i) {  // a block each, and of the others as many as it has of the work that is left
      const int64_t more = total > count ? (blocks - count) * (wanted[i] - 1) / (total - count) : 0;
      all.first_block[i + 1] = all.first_block[i] + static_cast<int>(1 + more);
    }
    launch("decode", kernel, dim3(static_cast<unsigned>(all.first_block[count])), kThreads, shared, first.stream,
           first.half == kBothHalves, all);
  });
}
