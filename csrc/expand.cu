// Rank space to y or dx:
//
//   expand_kernel  its product with rows of weights

#include "expand.cuh"

namespace {

constexpr int kThreads = limits::kTile * 2;  // a warp has 16 tokens
constexpr int kOutputs = 64;

template <class Scalar>
constexpr size_t kShared = kStages * (limits::kTile + kOutputs) * limits::kRow +
                           limits::kTile * kOutputs * sizeof(Scalar) + 2 * limits::kTile * (kOutputs / 16) * 2;

// Grid (tiles, splits of L). DROPS: the banks' products are masked before they are added, so each has its own sum.
template <class Scalar, bool DROPS>
__global__ void __launch_bounds__(kThreads, 1) expand_kernel(Expand p) {
  constexpr int BT = limits::kTile, BL = kOutputs, COLUMNS = kColumns<Scalar>, BLOCKS = BL / 16;
  SmemAllocator smem;
  auto u_tiles = smem.take<Scalar>(kStages * BT * COLUMNS);
  auto w_tiles = smem.take<Scalar>(kStages * BL * COLUMNS);
  auto staged = smem.take<Scalar>(BT * BL);
  auto keep = smem.take<uint16_t>(2 * BT * BLOCKS);  // [bank][row][block]

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, m = warp * 16;
  const SeqTile at = tile_to_seq(p, blockIdx.x, BT, 1);
  const int64_t row0 = at.start + at.tile * BT;
  if (row0 >= at.end) return;
  const int rows = static_cast<int>(min(at.end - row0, static_cast<int64_t>(BT)));

  const RankTiles tiles(p);
  const int width = tiles.total * 16, turns = static_cast<int>(cdiv(width, COLUMNS));
  const int64_t slice = cdiv(cdiv(p.L, BL), p.slices) * BL;
  const int64_t begin = blockIdx.y * slice, end = min(p.L, begin + slice);
  const int steps = begin < end ? static_cast<int>(cdiv(end - begin, BL)) * turns : 0;
  const int64_t seed = DROPS ? global<const int64_t>(p.seed)[0] : 0;
  const auto u = global<const Scalar>(p.u);

  const auto load = [&](int step) {
    const int turn = step % turns, column0 = turn * COLUMNS;
    const int64_t l = begin + step / turns * BL;
    if (turns > 1 || step == 0) {  // where rank space fits into one tile, it stays there
      auto tile = u_tiles + (turns > 1 ? step % kStages : 0) * BT * COLUMNS;
      for (int i = thread; i < BT * 8; i += kThreads) {
        const int row = i / 8, column = i % 8 * kChunk<Scalar>;
        load_chunk<Scalar>(tile + place<Scalar>(row, column), u + ((row0 + row) * width + column0 + column),
                           row < rows ? width - column0 - column : 0, true);
      }
    }
    const int column = thread % 8 * kChunk<Scalar>;
    const int r_tile = (column0 + column) / 16;  // the same in all of a thread's rows
    if (r_tile >= tiles.total) return;           // nor is it multiplied with
    auto tile = w_tiles + step % kStages * BL * COLUMNS;
    int64_t expert;
    int rank;
    expert_of_tile(p, tiles, at.seq, r_tile, expert, rank);
    const auto w = global<const Scalar>(r_tile < tiles.first ? p.weights.bank[0] : p.weights.bank[1]) +
                   (expert * p.weights.expert + l * p.weights.row + rank + column % 16);
    for (int row = thread / 8; row < BL; row += kThreads / 8) {
      load_chunk<Scalar>(tile + place<Scalar>(row, column), w + row * p.weights.row, l + row < p.L ? kChunk<Scalar> : 0,
                         true);
    }
  };

  float acc[DROPS ? 2 : 1][BLOCKS][2][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    const int turn = step % turns;
    const Ptr<const Scalar> u_tile = u_tiles + (turns > 1 ? step % kStages : 0) * BT * COLUMNS;
    const Ptr<const Scalar> w_tile = w_tiles + step % kStages * BL * COLUMNS;
    for (int k = 0; k < COLUMNS && turn * COLUMNS + k < width; k += 16) {
      Left<Scalar> a;
      load_left<false>(a, u_tile, m, k);
      if (!DROPS || turn * COLUMNS + k < tiles.first * 16) {
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) multiply<false>(acc[0][j], a, w_tile, j * 16, k);
      } else {
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) multiply<false>(acc[DROPS ? 1 : 0][j], a, w_tile, j * 16, k);
      }
    }
    if (turn < turns - 1) continue;

    const int64_t l = begin + step / turns * BL;
    if (DROPS) {
      for (int bank = 0; bank < 2; ++bank) {
        fill_keep(keep + (bank * BT + m) * BLOCKS, 16, BLOCKS, p, seed, row0 + m, l / 16,
                  bank ? p.streams[1] : p.streams[0], lane, 32);
      }
      __syncwarp();
    }
    // f(row of the tile, column, number) of all that a thread has
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int at = 0; at < BLOCKS * 8; ++at) {
        const int j = at / 8, half = at / 4 % 2, i = at % 4;
        f(m + lane / 4 + half * 8, j * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2, acc[0][j][i / 2][half * 2 + i % 2],
          acc[DROPS ? 1 : 0][j][i / 2][half * 2 + i % 2]);
      }
    };
    if (DROPS) {
      const float scale = 256.0f / static_cast<float>(256 - p.threshold);
      for_each([&](int row, int column, float& v, float other) {
        v = keep[row * BLOCKS + column / 16] >> column % 16 & 1 ? v : 0.0f;
        v += keep[(BT + row) * BLOCKS + column / 16] >> column % 16 & 1 ? other : 0.0f;
        v *= scale;
      });
    }
    if (p.bias != nullptr) {
      for_each([&](int, int column, float& v, float) {
        if (l + column < p.L) v += to_float(global<const Scalar>(p.bias)[l + column]);
      });
    }
    if (p.dmean != nullptr) {
      for_each([&](int row, int column, float& v, float) {
        const bool routed = row < rows && (p.route_mask == nullptr || global<const uint8_t>(p.route_mask)[row0 + row]);
        if (routed && l + column < p.L) v += global<const float>(p.dmean)[at.seq * p.L + l + column];
      });
    }
    // 16 bytes of a row lie where neither a quad's numbers nor the reads below share a bank with the next row's
    const auto spot = [](int row, int column) {
      return row * BL + (column / kChunk<Scalar> ^ row % 8) * kChunk<Scalar> + column % kChunk<Scalar>;
    };
    for_each([&](int row, int column, float& v, float) { staged[spot(row, column)] = from_float<Scalar>(v); });
    __syncwarp();
    constexpr int CHUNKS = BL / kChunk<Scalar>;  // of a row
    const bool aligned = p.L % kChunk<Scalar> == 0 && is_aligned(p.out, 16);
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
      const int row = m + i / CHUNKS, column = i % CHUNKS * kChunk<Scalar>;
      const int64_t valid = row < rows ? min(p.L - l - column, static_cast<int64_t>(kChunk<Scalar>)) : 0;
      auto out = global<Scalar>(p.out) + ((row0 + row) * p.L + l + column);
      if (aligned && valid == kChunk<Scalar>) {
        *view<uint4>(out) = *view<const uint4>(Ptr<const Scalar>(staged + spot(row, column)));
      } else {
        for (int e = 0; e < valid; ++e) out[e] = staged[spot(row, column) + e];
      }
    }
#pragma unroll
    for (int b = 0; b < (DROPS ? 2 : 1); ++b) {
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[b][j][i / 4][i % 4] = 0;
      }
    }
  }
}

template <class Scalar, bool DROPS>
void launch_expand(const char* name, const Expand& p) {
  static_assert(kShared<Scalar> <= limits::kSharedMemory);
  const auto tiles = static_cast<unsigned>(tile_count(p, limits::kTile, 1));
  const dim3 grid(tiles, static_cast<unsigned>(p.slices));
  launch(name, expand_kernel<Scalar, DROPS>, grid, kThreads, kShared<Scalar>, p.stream, false, p);
}

}  // namespace

void expand(const char* name, const Expand& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    p.threshold > 0 ? launch_expand<Scalar, true>(name, p) : launch_expand<Scalar, false>(name, p);
  });
}
