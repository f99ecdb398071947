// The product of tokens with rows of weights, into rank space, in parts over slices of the inputs; with column sums.
#pragma once

#include "tile.cuh"

struct Shrink : Layout {
  const void* s = nullptr;          // (T, L) T
  int64_t L = 0;
  Rows weights;                     // (E, RP, row) T
  int64_t width = 0;                // elements of a row of weights that may be read
  int64_t vu_slots = 0, all = 0;    // slots of the VU branch; all: they are all experts
  int64_t multiplies = 1;           // else it only sums
  const int* routes = nullptr;      // (n, b, K)
  int64_t splits = 1;
  float* part = nullptr;            // (splits, T, 16 units) out
  float* sums = nullptr;            // (tiles, L) out, or null: over the routed tokens of a tile
  const uint8_t* mask = nullptr;    // (T,) or null
  const int64_t* routed = nullptr;  // (n, 2)
};

constexpr int kShrinkThreads = limits::kTile * 2;  // a warp has 16 tokens

template <class T, int UNITS>
constexpr size_t kShrinkShared = kStages * (limits::kTile + UNITS * 16) * limits::kRow +
                                 4 * limits::kTile * (kColumns<T> / 16) * 2 + limits::kTile + 16 * UNITS;

// Grid (tiles, splits, blocks of units). The tiles of a pass that sums a mask are laid from the first routed token, so
// that left padding moves no sum.
template <class T, int UNITS>
__global__ void __launch_bounds__(kShrinkThreads, 1) shrink_kernel(Shrink p) {
  constexpr int BT = limits::kTile, COLUMNS = kColumns<T>, BLOCKS = COLUMNS / 16;
  Arena arena;
  auto s_tiles = arena.take<T>(kStages * BT * COLUMNS);
  auto w_tiles = arena.take<T>(kStages * UNITS * 16 * COLUMNS);
  auto keep = arena.take<uint16_t>(4 * BT * BLOCKS);  // [step % 2][stream][row][block]
  auto routed = arena.take<uint8_t>(BT);
  auto source = arena.take<int64_t>(UNITS);

  const int thread = threadIdx.x, lane = thread % 32, m = thread / 32 * 16;
  const bool packed = p.cu != nullptr, anchored = p.sums != nullptr && p.mask != nullptr;
  const Span span = locate(blockIdx.x, global<const int>(p.cu), packed, p.n, p.n > 0 ? p.T / p.n : 0, BT,
                           anchored ? 2 : 1);
  int64_t row0 = span.start + span.tile * BT;
  if (anchored) row0 -= (BT - global<const int64_t>(p.routed)[span.instance * 2] % BT) % BT;
  if (row0 >= span.end || row0 + BT <= span.start) return;

  const Units units(p, p.vu_slots);
  const int first = blockIdx.z * UNITS;
  const int count = p.multiplies ? min(UNITS, units.total - first) : 0;
  const int vu_count = max(0, min(count, units.vu - first));
  for (int u = thread; u < count; u += kShrinkThreads) {
    int64_t expert;
    int rank;
    locate_unit(p, units, global<const int>(p.routes), span.instance, first + u, p.all, expert, rank);
    source[u] = expert * p.weights.expert + rank * p.weights.row;
  }
  for (int row = thread; row < BT; row += kShrinkThreads) {
    const int64_t token = row0 + row;
    const bool inside = token >= span.start && token < span.end;
    routed[row] = inside && (p.mask == nullptr || global<const uint8_t>(p.mask)[token]);
  }
  const bool drops = p.threshold > 0 && count > 0;
  const int64_t seed = drops ? global<const int64_t>(p.seed)[0] : 0;
  const int64_t slice = cdiv(cdiv(p.L, COLUMNS), p.splits) * COLUMNS;
  const int64_t begin = blockIdx.y * slice, end = min(p.L, begin + slice);
  const int steps = begin < end ? static_cast<int>(cdiv(end - begin, COLUMNS)) : 0;
  const bool aligned = p.L % kChunk<T> == 0 && is_aligned(p.s, 16);
  const bool whole = aligned && row0 >= span.start && row0 + BT <= span.end;
  const auto s = global<const T>(p.s);
  __syncthreads();

  const auto load = [&](int step) {
    const int64_t c = begin + step * COLUMNS;
    auto s_tile = s_tiles + step % kStages * BT * COLUMNS;
    if (whole && c + COLUMNS <= p.L) {
      load_tile<BT, kShrinkThreads, T>(s_tile, s + (row0 * p.L + c), p.L);
    } else {
      for (int i = thread; i < BT * 8; i += kShrinkThreads) {
        const int row = i / 8, column = i % 8 * kChunk<T>;
        const int64_t token = row0 + row;
        const bool inside = token >= span.start && token < span.end;
        load_chunk<T>(s_tile + place<T>(row, column), s + (token * p.L + c + column), inside ? p.L - c - column : 0,
                      aligned);
      }
    }
    static_assert(kShrinkThreads == 16 * 8);  // a chunk of a unit each
    const int row = thread / 8, column = thread % 8 * kChunk<T>;
    auto w_tile = w_tiles + (step % kStages * UNITS * 16 * COLUMNS + place<T>(row, column));
    const int64_t from = row * p.weights.row + c + column, valid = p.width - c - column;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      if (u >= count) break;
      const auto w = global<const T>(u < vu_count ? p.weights.vu : p.weights.other) + (source[u] + from);
      load_chunk<T>(w_tile + u * 16 * COLUMNS, w, valid, true);
    }
  };
  const auto draw = [&](int step) {
    if (!drops || step >= steps) return;
    auto to = keep + step % 2 * 2 * BT * BLOCKS;
    const int64_t block = (begin + step * COLUMNS) / 16;
    if (vu_count > 0) fill_keep(to, BT, BLOCKS, p, seed, row0, block, 0, thread, kShrinkThreads);
    if (vu_count < count) {
      fill_keep(to + BT * BLOCKS, BT, BLOCKS, p, seed, row0, block, 1, thread, kShrinkThreads);
    }
  };

  float acc[UNITS][2][4] = {};
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
    const Ptr<const T> s_tile = s_tiles + step % kStages * BT * COLUMNS;
    const Ptr<const T> w_tile = w_tiles + step % kStages * UNITS * 16 * COLUMNS;
    const int64_t c = begin + step * COLUMNS;
    for (int block = 0; block < BLOCKS && c + block * 16 < p.L; ++block) {
      for (int stream = 0; stream < (drops ? 2 : 1); ++stream) {  // without dropout, both branches at once
        const int from = stream ? vu_count : 0, to = drops && !stream ? vu_count : count;
        if (from == to) continue;
        Left<T> a;
        load_left<false>(a, s_tile, m, block * 16);
        if (drops) drop(a, Ptr<const uint16_t>(keep + (step % 2 * 2 + stream) * BT * BLOCKS), BLOCKS, m, block);
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
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
        for (int j = 0; j < WIDTH; ++j) sum[j] += to_float(s_tile[place<T>(row, column + j)]);
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
  for (int u = 0; u < UNITS; ++u) {
    if (u >= count) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = row0 + m + lane / 4 + i / 2 * 8;
      if (token < span.start || token >= span.end) continue;
      const int64_t column = (first + u) * 16 + i % 2 * 8 + lane % 4 * 2;
      auto out = global<float>(p.part) + ((blockIdx.y * p.T + token) * units.total * 16 + column);
      *view<float2>(out) = make_float2(acc[u][i % 2][i / 2 * 2], acc[u][i % 2][i / 2 * 2 + 1]);
    }
  }
}

// Launches it with blocks of `columns` columns, which sets how often x is read: 32, 80 or 128.
void shrink(const Shrink& p, int64_t columns);
