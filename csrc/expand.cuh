// The product of rank space with rows of weights, out to y or dx: written once, 16 bytes at a time.
#pragma once

#include "tile.cuh"

struct Expand : Layout {
  const void* u = nullptr;         // (T, 16 units) T
  Rows weights;                    // (E, L, RP) T
  const int* routes = nullptr;     // (n, b, K)
  int64_t L = 0, splits = 1;
  const void* bias = nullptr;      // (L,) T or null
  const float* dmean = nullptr;    // (n, L) or null: added to the routed tokens
  const uint8_t* mask = nullptr;   // (T,) or null: the routed tokens
  void* out = nullptr;             // (T, L) T out
};

constexpr int kExpandThreads = limits::kTile * 2;  // a warp has 16 tokens
constexpr int kExpandOutputs = 64;

template <class T>
constexpr size_t kExpandShared = kStages * (limits::kTile + kExpandOutputs) * limits::kRow +
                                 limits::kTile * kExpandOutputs * sizeof(T) +
                                 2 * limits::kTile * (kExpandOutputs / 16) * 2;

// Grid (tiles, splits of L). DROPS: the branches' products are masked before they are added, so each has its own sum.
template <class T, bool DROPS>
__global__ void __launch_bounds__(kExpandThreads, 1) expand_kernel(Expand p) {
  constexpr int BT = limits::kTile, BL = kExpandOutputs, COLUMNS = kColumns<T>, BLOCKS = BL / 16;
  Arena arena;
  auto u_tiles = arena.take<T>(kStages * BT * COLUMNS);
  auto w_tiles = arena.take<T>(kStages * BL * COLUMNS);
  auto staged = arena.take<T>(BT * BL);
  auto keep = arena.take<uint16_t>(2 * BT * BLOCKS);  // [stream][row][block]

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, m = warp * 16;
  const Span span = locate(blockIdx.x, global<const int>(p.cu), p.cu != nullptr, p.n, p.T / p.n, BT, 1);
  const int64_t row0 = span.start + span.tile * BT;
  if (row0 >= span.end) return;
  const int rows = static_cast<int>(min(span.end - row0, static_cast<int64_t>(BT)));

  const Units units(p, p.K);
  const int width = units.total * 16, turns = static_cast<int>(cdiv(width, COLUMNS));
  const int64_t slice = cdiv(cdiv(p.L, BL), p.splits) * BL;
  const int64_t begin = blockIdx.y * slice, end = min(p.L, begin + slice);
  const int steps = begin < end ? static_cast<int>(cdiv(end - begin, BL)) * turns : 0;
  const int64_t seed = DROPS ? global<const int64_t>(p.seed)[0] : 0;
  const auto u = global<const T>(p.u);
  const auto routes = global<const int>(p.routes);

  const auto load = [&](int step) {
    const int turn = step % turns, column0 = turn * COLUMNS;
    const int64_t l = begin + step / turns * BL;
    if (turns > 1 || step == 0) {  // where rank space fits into one tile, it stays there
      auto tile = u_tiles + (turns > 1 ? step % kStages : 0) * BT * COLUMNS;
      for (int i = thread; i < BT * 8; i += kExpandThreads) {
        const int row = i / 8, column = i % 8 * kChunk<T>;
        load_chunk<T>(tile + place<T>(row, column), u + ((row0 + row) * width + column0 + column),
                      row < rows ? width - column0 - column : 0, true);
      }
    }
    const int column = thread % 8 * kChunk<T>, unit = (column0 + column) / 16;  // the same in all of a thread's rows
    if (unit >= units.total) return;                                            // nor is it multiplied with
    auto tile = w_tiles + step % kStages * BL * COLUMNS;
    int64_t expert;
    int rank;
    locate_unit(p, units, routes, span.instance, unit, false, expert, rank);
    const auto w = global<const T>(unit < units.vu ? p.weights.vu : p.weights.other) +
                   (expert * p.weights.expert + l * p.weights.row + rank + column % 16);
    for (int row = thread / 8; row < BL; row += kExpandThreads / 8) {
      load_chunk<T>(tile + place<T>(row, column), w + row * p.weights.row, l + row < p.L ? kChunk<T> : 0, true);
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
    const Ptr<const T> u_tile = u_tiles + (turns > 1 ? step % kStages : 0) * BT * COLUMNS;
    const Ptr<const T> w_tile = w_tiles + step % kStages * BL * COLUMNS;
    for (int k = 0; k < COLUMNS && turn * COLUMNS + k < width; k += 16) {
      Left<T> a;
      load_left<false>(a, u_tile, m, k);
      if (!DROPS || turn * COLUMNS + k < units.vu * 16) {
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
      for (int stream = 0; stream < 2; ++stream) {
        fill_keep(keep + (stream * BT + m) * BLOCKS, 16, BLOCKS, p, seed, row0 + m, l / 16, stream, lane, 32);
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
        if (l + column < p.L) v += to_float(global<const T>(p.bias)[l + column]);
      });
    }
    if (p.dmean != nullptr) {
      for_each([&](int row, int column, float& v, float) {
        const bool routed = row < rows && (p.mask == nullptr || global<const uint8_t>(p.mask)[row0 + row]);
        if (routed && l + column < p.L) v += global<const float>(p.dmean)[span.instance * p.L + l + column];
      });
    }
    // 16 bytes of a row lie where neither a quad's numbers nor the reads below share a bank with the next row's
    const auto spot = [](int row, int column) {
      return row * BL + (column / kChunk<T> ^ row % 8) * kChunk<T> + column % kChunk<T>;
    };
    for_each([&](int row, int column, float& v, float) { staged[spot(row, column)] = from_float<T>(v); });
    __syncwarp();
    constexpr int CHUNKS = BL / kChunk<T>;  // of a row
    const bool aligned = p.L % kChunk<T> == 0 && is_aligned(p.out, 16);
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
      const int row = m + i / CHUNKS, column = i % CHUNKS * kChunk<T>;
      const int64_t valid = row < rows ? min(p.L - l - column, static_cast<int64_t>(kChunk<T>)) : 0;
      auto out = global<T>(p.out) + ((row0 + row) * p.L + l + column);
      if (aligned && valid == kChunk<T>) {
        *view<uint4>(out) = *view<const uint4>(Ptr<const T>(staged + spot(row, column)));
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

void expand(const char* name, const Expand& p);
