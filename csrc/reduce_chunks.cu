// The sum over tokens of dA and dB:
//
//   reduce_chunks_kernel  adds up the parts of an expert, which `outer` left by chunk and slot

#include "reduce_chunks.cuh"

namespace {

constexpr int kThreads = 256;

// Grid (blocks of r L, experts of all banks). Each thread looks up one chunk for the whole block: the slot, if any, in
// which the chunk's sequence has the expert.
__global__ void __launch_bounds__(kThreads, 1) reduce_chunks_kernel(ReduceChunks p) {
  SmemAllocator smem;
  auto slots = smem.take<int>(kThreads);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool second = blockIdx.y >= p.experts[0];
  const int64_t expert = second ? blockIdx.y - p.experts[0] : blockIdx.y;
  const Weight out = second ? p.out[1] : p.out[0];
  if (out.data == nullptr) return;
  const bool inside = i < p.r * p.L;
  const auto trained = global<const uint8_t>(second ? p.trained[1] : p.trained[0]);
  if ((second ? p.trained[1] : p.trained[0]) != nullptr && !trained[expert]) {
    if (inside) set_weight(out, expert * p.r * p.L + i, 0.0f);
    return;
  }
  const int64_t rank = p.by_column ? i / p.L : i % p.r, l = p.by_column ? i % p.L : i / p.r;
  const RankTiles tiles(p);
  const int K = static_cast<int>(second ? p.slots[1] : p.slots[0]);
  const int64_t width = tiles.total * 16, column0 = (second ? tiles.first * 16 : 0) + rank;
  const bool in_order = second ? p.in_order[1] : p.in_order[0];
  const int RP = rank16(p.r);
  const auto ids = in_order ? global<const int>(p.ids) : global<const int>(p.ids) + second * p.K;  // of the bank
  const auto seqs = global<const int>(p.chunk_to_seq);
  const auto part = global<const float>(p.part) +  // a slot's columns are whole tiles
                    (p.by_column ? column0 * p.L + l : (column0 / 16 * p.L + l) * 16 + column0 % 16);
  const auto holds = [&](int64_t seq, int slot) {
    return in_order ? slot == expert : ids[seq * p.b * p.K + slot] == expert;
  };
  float sum = 0;
  for (int64_t first = 0; first < p.chunks; first += kThreads) {
    const int64_t asked = first + threadIdx.x, seq = asked < p.chunks ? seqs[asked] : -1;
    int slot = 0;  // the first with the expert; given ids may have it several times
    while (slot < K && (seq < 0 || !holds(seq, slot))) ++slot;
    __syncthreads();
    slots[threadIdx.x] = slot;
    __syncthreads();
    const int count = static_cast<int>(min(p.chunks - first, static_cast<int64_t>(kThreads)));
#pragma unroll 4
    for (int chunk = 0; chunk < count; ++chunk) {
      for (int j = slots[chunk]; j < K && inside; ++j) {
        if (j > slots[chunk] && !holds(seqs[first + chunk], j)) continue;
        sum += part[((first + chunk) * width + j * RP) * p.L];
      }
    }
  }
  if (!inside) return;
  sum *= static_cast<float>(p.scale);
  if (p.factor != nullptr) {
    const int64_t row = (p.own_addend ? expert * p.L : 0) + l;
    sum += weight_at(second ? p.addend[1] : p.addend[0], row) * global<const float>(p.factor)[blockIdx.y * p.r + rank];
  }
  set_weight(out, expert * p.r * p.L + i, sum);
}

}  // namespace

void reduce_chunks(const ReduceChunks& p) {
  const dim3 grid(static_cast<unsigned>(cdiv(p.r * p.L, kThreads)),
                  static_cast<unsigned>(p.experts[0] + p.experts[1]));
  launch("reduce_chunks", reduce_chunks_kernel, grid, kThreads, kThreads * sizeof(int), p.stream, false, p);
}
