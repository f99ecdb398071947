// Tokens into rank space:
//
//   shrink_kernel  their product with rows of weights, and their column sums

#include "shrink.cuh"

namespace {

constexpr int kThreads = limits::kTile * 2;  // a warp has 16 tokens

template <class Scalar, int TILES>
constexpr size_t kShared = kStages * (limits::kTile + TILES * 16) * limits::kRow +
                           4 * limits::kTile * (kColumns<Scalar> / 16) * 2 + limits::kTile + 16 * TILES;

// Grid (tiles, parts of L, blocks of tiles in rank space). The tiles of a pass that sums a mask are laid from the first
// routed token, so that left padding moves no sum.
template <class Scalar, int TILES>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(Shrink p) {
  constexpr int BT = limits::kTile, COLUMNS = kColumns<Scalar>, BLOCKS = COLUMNS / 16;
  SmemAllocator smem;
  auto s_tiles = smem.take<Scalar>(kStages * BT * COLUMNS);
  auto w_tiles = smem.take<Scalar>(kStages * TILES * 16 * COLUMNS);
  auto keep = smem.take<uint16_t>(4 * BT * BLOCKS);  // [step % 2][bank][row][block]
  auto routed = smem.take<uint8_t>(BT);
  auto source = smem.take<int64_t>(TILES);

  const int thread = threadIdx.x, lane = thread % 32, m = thread / 32 * 16;
  const bool anchored = p.sums != nullptr && p.route_mask != nullptr;
  const SeqTile at = tile_to_seq(p, blockIdx.x, BT, anchored ? 2 : 1);
  int64_t row0 = at.start + at.tile * BT;
  if (anchored) row0 -= (BT - global<const int64_t>(p.routed)[at.seq * 2] % BT) % BT;
  if (row0 >= at.end || row0 + BT <= at.start) return;

  const RankTiles tiles(p);
  const int first = blockIdx.z * TILES;
  const int count = p.multiplies ? min(TILES, tiles.total - first) : 0;
  const int of_first = max(0, min(count, tiles.first - first));  // tiles of the first bank
  for (int u = thread; u < count; u += kThreads) {
    int64_t expert;
    int rank;
    expert_of_tile(p, tiles, at.seq, first + u, expert, rank);
    source[u] = expert * p.weights.expert + rank * p.weights.row;
  }
  for (int row = thread; row < BT; row += kThreads) {
    const int64_t token = row0 + row;
    const bool inside = token >= at.start && token < at.end;
    routed[row] = inside && (p.route_mask == nullptr || global<const uint8_t>(p.route_mask)[token]);
  }
  const bool drops = p.threshold > 0 && count > 0;
  const int64_t seed = drops ? global<const int64_t>(p.seed)[0] : 0;
  const int64_t slice = cdiv(cdiv(p.L, COLUMNS), p.split_k) * COLUMNS;
  const int64_t begin = blockIdx.y * slice, end = min(p.L, begin + slice);
  const int steps = begin < end ? static_cast<int>(cdiv(end - begin, COLUMNS)) : 0;
  const bool aligned = p.L % kChunk<Scalar> == 0 && is_aligned(p.src, 16);
  const bool whole = aligned && row0 >= at.start && row0 + BT <= at.end;
  const auto s = global<const Scalar>(p.src);
  __syncthreads();

  const auto load = [&](int step) {
    const int64_t c = begin + step * COLUMNS;
    auto s_tile = s_tiles + step % kStages * BT * COLUMNS;
    if (whole && c + COLUMNS <= p.L) {
      load_tile<BT, kThreads, Scalar>(s_tile, s + (row0 * p.L + c), p.L);
    } else {
      for (int i = thread; i < BT * 8; i += kThreads) {
        const int row = i / 8, column = i % 8 * kChunk<Scalar>;
        const int64_t token = row0 + row;
        const bool inside = token >= at.start && token < at.end;
        load_chunk<Scalar>(s_tile + place<Scalar>(row, column), s + (token * p.L + c + column),
                           inside ? p.L - c - column : 0, aligned);
      }
    }
    static_assert(kThreads == 16 * 8);  // a chunk of a unit each
    const int row = thread / 8, column = thread % 8 * kChunk<Scalar>;
    auto w_tile = w_tiles + (step % kStages * TILES * 16 * COLUMNS + place<Scalar>(row, column));
    const int64_t from = row * p.weights.row + c + column, valid = p.width - c - column;
#pragma unroll
    for (int u = 0; u < TILES; ++u) {
      if (u >= count) break;
      const auto w = global<const Scalar>(u < of_first ? p.weights.bank[0] : p.weights.bank[1]) + (source[u] + from);
      load_chunk<Scalar>(w_tile + u * 16 * COLUMNS, w, valid, true);
    }
  };
  const auto draw = [&](int step) {
    if (!drops || step >= steps) return;
    auto to = keep + step % 2 * 2 * BT * BLOCKS;
    const int64_t block = (begin + step * COLUMNS) / 16;
    if (of_first > 0) fill_keep(to, BT, BLOCKS, p, seed, row0, block, p.streams[0], thread, kThreads);
    if (of_first < count) {
      fill_keep(to + BT * BLOCKS, BT, BLOCKS, p, seed, row0, block, p.streams[1], thread, kThreads);
    }
  };

  float acc[TILES][2][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  draw(0);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles are in, and everybody is done with the ones before
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    draw(step + 1);
    const Ptr<const Scalar> s_tile = s_tiles + step % kStages * BT * COLUMNS;
    const Ptr<const Scalar> w_tile = w_tiles + step % kStages * TILES * 16 * COLUMNS;
    const int64_t c = begin + step * COLUMNS;
    for (int block = 0; block < BLOCKS && c + block * 16 < p.L; ++block) {
      for (int bank = 0; bank < (drops ? 2 : 1); ++bank) {  // without dropout, both at once
        const int from = bank ? of_first : 0, to = drops && !bank ? of_first : count;
        if (from == to) continue;
        Left<Scalar> a;
        load_left<false>(a, s_tile, m, block * 16);
        if (drops) drop(a, Ptr<const uint16_t>(keep + (step % 2 * 2 + bank) * BT * BLOCKS), BLOCKS, m, block);
#pragma unroll
        for (int u = 0; u < TILES; ++u) {
          if (u >= from && u < to) multiply<false>(acc[u], a, w_tile, u * 16, block * 16);
        }
      }
    }
    if (p.sums != nullptr && blockIdx.z == 0) {  // four lanes share a column's rows
      constexpr int WIDTH = COLUMNS / 32;
      const int column = thread / 4 * WIDTH;
      float sum[WIDTH] = {};
      for (int row = thread % 4; row < BT; row += 4) {
        if (!routed[row]) continue;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum[j] += to_float(s_tile[place<Scalar>(row, column + j)]);
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        sum[j] += shuffle_xor(sum[j], 1);
        sum[j] += shuffle_xor(sum[j], 2);
        if (lane % 4 == 0 && c + column + j < p.L) global<float>(p.sums)[blockIdx.x * p.L + c + column + j] = sum[j];
      }
    }
  }

#pragma unroll
  for (int u = 0; u < TILES; ++u) {
    if (u >= count) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = row0 + m + lane / 4 + i / 2 * 8;
      if (token < at.start || token >= at.end) continue;
      const int64_t column = (first + u) * 16 + i % 2 * 8 + lane % 4 * 2;
      auto out = global<float>(p.part) + ((blockIdx.y * p.T + token) * tiles.total * 16 + column);
      *view<float2>(out) = make_float2(acc[u][i % 2][i / 2 * 2], acc[u][i % 2][i / 2 * 2 + 1]);
    }
  }
}

template <class Scalar, int TILES>
void launch_shrink(const Shrink& p) {
  static_assert(kShared<Scalar, TILES> <= limits::kSharedMemory);
  const int64_t tiles = tile_count(p, limits::kTile, p.sums != nullptr && p.route_mask != nullptr ? 2 : 1);
  const int64_t blocks = p.multiplies ? cdiv(RankTiles(p).total, TILES) : 1;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.split_k), static_cast<unsigned>(blocks));
  launch("shrink", shrink_kernel<Scalar, TILES>, grid, kThreads, kShared<Scalar, TILES>, p.stream, false, p);
}

}  // namespace

void shrink(const Shrink& p, int64_t columns) {
  with_dtype(p.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    switch (columns) {
      case 32: return launch_shrink<Scalar, 2>(p);
      case 80: return launch_shrink<Scalar, 5>(p);
      default: return launch_shrink<Scalar, sizeof(Scalar) == 2 ? 8 : 5>(p);  // in float32, 128 would spill
    }
  });
}
