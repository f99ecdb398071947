// The outer product of tokens with rank space, summed over a chunk of an instance's tokens: the gradients of A and B.
// With P, the product of the same tokens with rows of weights into rank space comes from the same read, and there is no
// dropout.
#pragma once

#include "tile.cuh"

struct Outer : Layout {
  const void* s = nullptr;        // (T, L) T
  const void* u = nullptr;        // (T, 16 units) T
  int64_t L = 0, chunk = 0, chunks = 0;
  int64_t adds_up = 1;            // else P alone
  int64_t by_column = 0;          // parts are (chunks, 16 units, L), else (chunks, units, L, 16)
  float* part = nullptr;          // out
  int* owner = nullptr;           // (chunks,) out: the chunk's instance, -1 if it has no token
  Rows weights;                   // P: (E, L, RP) T
  const int* routes = nullptr;    // P: (n, b, K)
  float* p_part = nullptr;        // P: (blocks of L, T, 16 units) out
};

constexpr int kOuterThreads = 256;
constexpr int kOuterWarps = kOuterThreads / 32;
template <class T>
constexpr int kOuterInputs = limits::kOuterTiles * kColumns<T>;  // of the long axis that a block has

template <class T, int UNITS>
constexpr int kUnitTiles = (UNITS * 16 + kColumns<T> - 1) / kColumns<T>;  // side by side

// Numbers that warps hand to the one that adds them up, where several share a product.
template <int UNITS>
constexpr int kHanded = UNITS <= 2 ? (kOuterWarps - 2) * 256 : 0;

template <class T, int UNITS, bool P>
constexpr size_t kOuterShared =
    kStages * limits::kChunk * limits::kRow * (limits::kOuterTiles + kUnitTiles<T, UNITS>) +
    (P ? kUnitTiles<T, UNITS> * kOuterInputs<T> * limits::kRow + kHanded<UNITS> * 4
       : 4 * limits::kChunk * (kOuterInputs<T> / 16) * 2);

// Grid (chunks, blocks of L, blocks of units).
template <class T, int UNITS, bool P>
__global__ void __launch_bounds__(kOuterThreads, 1) outer_kernel(Outer p) {
  constexpr int BT = limits::kChunk, COLUMNS = kColumns<T>, TILES = limits::kOuterTiles, BL = kOuterInputs<T>;
  constexpr int BLOCKS = BL / 16, MINE = BLOCKS / kOuterWarps, SIDE = kUnitTiles<T, UNITS>;
  Arena arena;
  auto s_tiles = arena.take<T>(kStages * TILES * BT * COLUMNS);
  auto u_tiles = arena.take<T>(kStages * SIDE * BT * COLUMNS);
  auto keep = arena.take<uint16_t>(P ? 0 : 4 * BT * BLOCKS);  // [step % 2][stream][row][block]
  auto w_tiles = arena.take<T>(P ? SIDE * BL * COLUMNS : 0);
  auto handed = arena.take<float>(P ? kHanded<UNITS> : 0);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Span span = locate(blockIdx.x, global<const int>(p.cu), p.cu != nullptr, p.n, p.T / p.n,
                           static_cast<int>(p.chunk), 1);
  const int64_t start = span.start + span.tile * p.chunk, end = min(span.end, start + p.chunk);
  if (thread == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
    global<int>(p.owner)[blockIdx.x] = start < end ? span.instance : -1;
  }
  if (start >= end) return;
  const Units units(p, p.K);
  const int first = blockIdx.z * UNITS, count = min(UNITS, units.total - first);
  const int vu_count = max(0, min(count, units.vu - first)), width = units.total * 16;
  const int64_t l0 = static_cast<int64_t>(blockIdx.y) * BL;
  const int steps = static_cast<int>(cdiv(end - start, BT));
  const bool aligned = p.L % kChunk<T> == 0 && is_aligned(p.s, 16), drops = !P && p.threshold > 0;
  const int64_t seed = drops ? global<const int64_t>(p.seed)[0] : 0;
  const auto s = global<const T>(p.s);
  const auto u = global<const T>(p.u);

  const auto load = [&](int step) {
    const int64_t t = start + step * BT;
    auto s_tile = s_tiles + step % kStages * TILES * BT * COLUMNS;
    if (aligned && t + BT <= end && l0 + BL <= p.L) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        load_tile<BT, kOuterThreads, T>(s_tile + tile * BT * COLUMNS, s + (t * p.L + l0 + tile * COLUMNS), p.L);
      }
    } else {
      for (int i = thread; i < BT * TILES * 8; i += kOuterThreads) {
        const int row = i / (TILES * 8), tile = i / 8 % TILES, column = i % 8 * kChunk<T>;
        const int64_t l = l0 + tile * COLUMNS + column;
        load_chunk<T>(s_tile + (tile * BT * COLUMNS + place<T>(row, column)), s + ((t + row) * p.L + l),
                      t + row < end ? p.L - l : 0, aligned);
      }
    }
    auto u_tile = u_tiles + step % kStages * SIDE * BT * COLUMNS;
    for (int i = thread; i < BT * SIDE * 8; i += kOuterThreads) {
      const int row = i / (SIDE * 8), tile = i / 8 % SIDE, column = i % 8 * kChunk<T>;
      const int c = tile * COLUMNS + column;
      if (c >= count * 16 || !p.adds_up) continue;  // nor is it multiplied with
      load_chunk<T>(u_tile + (tile * BT * COLUMNS + place<T>(row, column)), u + ((t + row) * width + first * 16 + c),
                    t + row < end ? kChunk<T> : 0, true);
    }
  };
  const auto draw = [&](int step) {
    if (!drops || step >= steps) return;
    auto to = keep + step % 2 * 2 * BT * BLOCKS;
    const int64_t t = start + step * BT;
    if (vu_count > 0) fill_keep(to, BT, BLOCKS, p, seed, t, l0 / 16, 0, thread, kOuterThreads);
    if (vu_count < count) fill_keep(to + BT * BLOCKS, BT, BLOCKS, p, seed, t, l0 / 16, 1, thread, kOuterThreads);
  };

  if (P) {
    for (int i = thread; i < BL * SIDE * 8; i += kOuterThreads) {
      const int row = i / (SIDE * 8), tile = i / 8 % SIDE, column = i % 8 * kChunk<T>;
      const int unit = (tile * COLUMNS + column) / 16;
      if (unit >= count) continue;
      int64_t expert;
      int rank;
      locate_unit(p, units, global<const int>(p.routes), span.instance, unit, false, expert, rank);
      const auto w = global<const T>(unit < units.vu ? p.weights.vu : p.weights.other);
      load_chunk<T>(w_tiles + (tile * BL * COLUMNS + place<T>(row, column)),
                    w + (expert * p.weights.expert + (l0 + row) * p.weights.row + rank + column % 16),
                    l0 + row < p.L ? kChunk<T> : 0, true);
    }
  }
  float acc[MINE][UNITS][2][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  draw(0);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit();
    draw(step + 1);
    const Ptr<const T> s_tile = s_tiles + step % kStages * TILES * BT * COLUMNS;
    const Ptr<const T> u_tile = u_tiles + step % kStages * SIDE * BT * COLUMNS;
    if (p.adds_up) {
#pragma unroll
      for (int mine = 0; mine < MINE; ++mine) {
        const int block = warp * MINE + mine;
        const Ptr<const T> tile = s_tile + block * 16 / COLUMNS * BT * COLUMNS;
#pragma unroll
        for (int k = 0; k < BT; k += 16) {
          for (int stream = 0; stream < (drops ? 2 : 1); ++stream) {
            const int from = stream ? vu_count : 0, to = drops && !stream ? vu_count : count;
            if (from == to) continue;
            Left<T> a;
            load_left<true>(a, tile, block * 16 % COLUMNS, k);
            if (drops) {
              const auto bits = keep + (step % 2 * 2 + stream) * BT * BLOCKS;
              drop_transposed(a, Ptr<const uint16_t>(bits), BLOCKS, k, block);
            }
#pragma unroll
            for (int unit = 0; unit < UNITS; ++unit) {
              if (unit >= from && unit < to) {
                multiply<true>(acc[mine][unit], a, u_tile + unit * 16 / COLUMNS * BT * COLUMNS, unit * 16 % COLUMNS, k);
              }
            }
          }
        }
      }
    }
    if (P) {  // a warp has 16 tokens, a unit, and a share of the inputs, the shares being added in their order
      const int shares = 4 / count, group = warp / 2, unit = group % count, share = group / count, m = warp % 2 * 16;
      float sum[2][4] = {};
      if (share < shares) {
        for (int block = share * BLOCKS / shares; block < (share + 1) * BLOCKS / shares; ++block) {
          Left<T> a;
          load_left<false>(a, s_tile + block * 16 / COLUMNS * BT * COLUMNS, m, block * 16 % COLUMNS);
          multiply<true>(sum, a, Ptr<const T>(w_tiles + unit * 16 / COLUMNS * BL * COLUMNS), unit * 16 % COLUMNS,
                         block * 16);
        }
      }
      if (shares > 1) {  // of the first `count` pairs of warps
        if (share > 0 && share < shares) {
#pragma unroll
          for (int i = 0; i < 8; ++i) handed[(warp - 2 * count) * 256 + i * 32 + lane] = sum[i / 4][i % 4];
        }
        __syncthreads();
        for (int other = 1; other < shares && share == 0; ++other) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sum[i / 4][i % 4] += handed[(((other - 1) * count + unit) * 2 + warp % 2) * 256 + i * 32 + lane];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = start + step * BT + m + lane / 4 + i / 2 * 8;
        if (share > 0 || token >= end) continue;
        auto out = global<float>(p.p_part) +
                   ((blockIdx.y * p.T + token) * width + unit * 16 + i % 2 * 8 + lane % 4 * 2);
        *view<float2>(out) = make_float2(sum[i % 2][i / 2 * 2], sum[i % 2][i / 2 * 2 + 1]);
      }
    }
  }

  if (!p.adds_up) return;
#pragma unroll
  for (int mine = 0; mine < MINE; ++mine) {
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      if (unit >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t l = l0 + (warp * MINE + mine) * 16 + lane / 4 + i / 2 * 8;
        if (l >= p.L) continue;
        const float even = acc[mine][unit][i % 2][i / 2 * 2], odd = acc[mine][unit][i % 2][i / 2 * 2 + 1];
        const int column = i % 2 * 8 + lane % 4 * 2;
        const int64_t at = static_cast<int64_t>(blockIdx.x) * units.total + first + unit;
        if (p.by_column) {
          global<float>(p.part)[(at * 16 + column) * p.L + l] = even;
          global<float>(p.part)[(at * 16 + column + 1) * p.L + l] = odd;
        } else {
          *view<float2>(global<float>(p.part) + ((at * p.L + l) * 16 + column)) = make_float2(even, odd);
        }
      }
    }
  }
}

// Launches it, with P where `p_part` is given.
void outer(const char* name, const Outer& p);

// What the chunks' parts add up to, for each expert, times `scale`, plus addend[row] factor[expert][rank].
struct Collect : Layout {
  const float* part = nullptr;
  const int* owner = nullptr;      // (chunks,)
  const int* routes = nullptr;     // (n, b, K)
  int64_t L = 0, chunks = 0;
  int64_t by_column = 0;
  double scale = 1;
  Weight addend[2];                // (L,) of a branch
  const float* factor = nullptr;   // (M + N, r) or null
  Weight out[2];                   // of a branch (experts, L, r), or (experts, r, L) by columns; or null
};
void collect(const Collect& p);
