// Partial gradients of A and B:
//
//   outer_kernel  the outer product of tokens with rank space, summed over a chunk of tokens; and from the same read
//                 the tokens' product with rows of weights

#include "outer.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class Scalar, int TILES>
constexpr int kRankTiles = (TILES * 16 + kColumns<Scalar> - 1) / kColumns<Scalar>;  // side by side

// Numbers that warps hand to the one that adds them up, where several share a product.
template <int TILES>
constexpr int kHanded = TILES <= 2 ? (kWarps - 2) * 256 : 0;

template <class Scalar, int TILES, bool P>
constexpr size_t kShared =
    kStages * limits::kChunk * limits::kRow * (limits::kOuterTiles + kRankTiles<Scalar, TILES>) +
    (P ? kRankTiles<Scalar, TILES> * kOuterInputs<Scalar> * limits::kRow + kHanded<TILES> * 4
       : 4 * limits::kChunk * (kOuterInputs<Scalar> / 16) * 2);

// Grid (chunks, blocks of L, blocks of tiles in rank space).
template <class Scalar, int TILES, bool P>
__global__ void __launch_bounds__(kThreads, 1) outer_kernel(Outer p) {
  constexpr int BT = limits::kChunk, COLUMNS = kColumns<Scalar>;
  constexpr int L_TILES = limits::kOuterTiles, BL = kOuterInputs<Scalar>;
  constexpr int BLOCKS = BL / 16, MINE = BLOCKS / kWarps, SIDE = kRankTiles<Scalar, TILES>;
  SmemAllocator smem;
  auto s_tiles = smem.take<Scalar>(kStages * L_TILES * BT * COLUMNS);
  auto u_tiles = smem.take<Scalar>(kStages * SIDE * BT * COLUMNS);
  auto keep = smem.take<uint16_t>(P ? 0 : 4 * BT * BLOCKS);  // [step % 2][bank][row][block]
  auto w_tiles = smem.take<Scalar>(P ? SIDE * BL * COLUMNS : 0);
  auto handed = smem.take<float>(P ? kHanded<TILES> : 0);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const SeqTile at = tile_to_seq(p, blockIdx.x, static_cast<int>(p.chunk), 1);
  const int64_t start = at.start + at.tile * p.chunk, end = min(at.end, start + p.chunk);
  if (thread == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
    global<int>(p.chunk_to_seq)[blockIdx.x] = start < end ? at.seq : -1;
  }
  if (start >= end) return;
  const RankTiles tiles(p);
  const int first = blockIdx.z * TILES, count = min(TILES, tiles.total - first);
  const int of_first = max(0, min(count, tiles.first - first)), width = tiles.total * 16;
  const int64_t l0 = static_cast<int64_t>(blockIdx.y) * BL;
  const int steps = static_cast<int>(cdiv(end - start, BT));
  const bool aligned = p.L % kChunk<Scalar> == 0 && is_aligned(p.src, 16), drops = !P && p.threshold > 0;
  const int64_t seed = drops ? global<const int64_t>(p.seed)[0] : 0;
  const auto s = global<const Scalar>(p.src);
  const auto u = global<const Scalar>(p.u);

  const auto load = [&](int step) {
    const int64_t t = start + step * BT;
    auto s_tile = s_tiles + step % kStages * L_TILES * BT * COLUMNS;
    if (aligned && t + BT <= end && l0 + BL <= p.L) {
#pragma unroll
      for (int tile = 0; tile < L_TILES; ++tile) {
        load_tile<BT, kThreads, Scalar>(s_tile + tile * BT * COLUMNS, s + (t * p.L + l0 + tile * COLUMNS), p.L);
      }
    } else {
      for (int i = thread; i < BT * L_TILES * 8; i += kThreads) {
        const int row = i / (L_TILES * 8), tile = i / 8 % L_TILES, column = i % 8 * kChunk<Scalar>;
        const int64_t l = l0 + tile * COLUMNS + column;
        load_chunk<Scalar>(s_tile + (tile * BT * COLUMNS + place<Scalar>(row, column)), s + ((t + row) * p.L + l),
                           t + row < end ? p.L - l : 0, aligned);
      }
    }
    auto u_tile = u_tiles + step % kStages * SIDE * BT * COLUMNS;
    for (int i = thread; i < BT * SIDE * 8; i += kThreads) {
      const int row = i / (SIDE * 8), tile = i / 8 % SIDE, column = i % 8 * kChunk<Scalar>;
      const int c = tile * COLUMNS + column;
      if (c >= count * 16 || !p.need_sums) continue;  // nor is it multiplied with
      load_chunk<Scalar>(u_tile + (tile * BT * COLUMNS + place<Scalar>(row, column)),
                         u + ((t + row) * width + first * 16 + c), t + row < end ? kChunk<Scalar> : 0, true);
    }
  };
  const auto draw = [&](int step) {
    if (!drops || step >= steps) return;
    auto to = keep + step % 2 * 2 * BT * BLOCKS;
    const int64_t t = start + step * BT;
    if (of_first > 0) fill_keep(to, BT, BLOCKS, p, seed, t, l0 / 16, p.streams[0], thread, kThreads);
    if (of_first < count) fill_keep(to + BT * BLOCKS, BT, BLOCKS, p, seed, t, l0 / 16, p.streams[1], thread, kThreads);
  };

  if (P) {
    for (int i = thread; i < BL * SIDE * 8; i += kThreads) {
      const int row = i / (SIDE * 8), tile = i / 8 % SIDE, column = i % 8 * kChunk<Scalar>;
      const int r_tile = (tile * COLUMNS + column) / 16;
      if (r_tile >= count) continue;
      int64_t expert;
      int rank;
      expert_of_tile(p, tiles, at.seq, r_tile, expert, rank);
      const auto w = global<const Scalar>(r_tile < tiles.first ? p.weights.bank[0] : p.weights.bank[1]);
      load_chunk<Scalar>(w_tiles + (tile * BL * COLUMNS + place<Scalar>(row, column)),
                         w + (expert * p.weights.expert + (l0 + row) * p.weights.row + rank + column % 16),
                         l0 + row < p.L ? kChunk<Scalar> : 0, true);
    }
  }
  float acc[MINE][TILES][2][4] = {};
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
    const Ptr<const Scalar> s_tile = s_tiles + step % kStages * L_TILES * BT * COLUMNS;
    const Ptr<const Scalar> u_tile = u_tiles + step % kStages * SIDE * BT * COLUMNS;
    if (p.need_sums) {  // acc += s u^T over the BT tokens of this tile: dB and dA's sum over tokens
#pragma unroll
      for (int mine = 0; mine < MINE; ++mine) {
        const int block = warp * MINE + mine;
        const Ptr<const Scalar> tile = s_tile + block * 16 / COLUMNS * BT * COLUMNS;
#pragma unroll
        for (int t = 0; t < BT; t += 16) {
          for (int bank = 0; bank < (drops ? 2 : 1); ++bank) {
            const int from = bank ? of_first : 0, to = drops && !bank ? of_first : count;
            if (from == to) continue;
            Left<Scalar> a;
            load_left<true>(a, tile, block * 16 % COLUMNS, t);
            if (drops) {
              const auto bits = keep + (step % 2 * 2 + bank) * BT * BLOCKS;
              drop_transposed(a, Ptr<const uint16_t>(bits), BLOCKS, t, block);
            }
#pragma unroll
            for (int r_tile = 0; r_tile < TILES; ++r_tile) {
              if (r_tile >= from && r_tile < to) {
                const auto columns = u_tile + r_tile * 16 / COLUMNS * BT * COLUMNS;
                multiply<true>(acc[mine][r_tile], a, columns, r_tile * 16 % COLUMNS, t);
              }
            }
          }
        }
      }
    }
    if (P) {  // a warp has 16 tokens, a tile of rank space, and a share of L; shares are added in their order
      const int shares = 4 / count, group = warp / 2, r_tile = group % count, share = group / count, m = warp % 2 * 16;
      float sum[2][4] = {};
      if (share < shares) {
        for (int block = share * BLOCKS / shares; block < (share + 1) * BLOCKS / shares; ++block) {
          Left<Scalar> a;
          load_left<false>(a, s_tile + block * 16 / COLUMNS * BT * COLUMNS, m, block * 16 % COLUMNS);
          multiply<true>(sum, a, Ptr<const Scalar>(w_tiles + r_tile * 16 / COLUMNS * BL * COLUMNS),
                         r_tile * 16 % COLUMNS, block * 16);
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
            sum[i / 4][i % 4] += handed[(((other - 1) * count + r_tile) * 2 + warp % 2) * 256 + i * 32 + lane];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = start + step * BT + m + lane / 4 + i / 2 * 8;
        if (share > 0 || token >= end) continue;
        auto out = global<float>(p.p_part) +
                   ((blockIdx.y * p.T + token) * width + r_tile * 16 + i % 2 * 8 + lane % 4 * 2);
        *view<float2>(out) = make_float2(sum[i % 2][i / 2 * 2], sum[i % 2][i / 2 * 2 + 1]);
      }
    }
  }

  if (!p.need_sums) return;
#pragma unroll
  for (int mine = 0; mine < MINE; ++mine) {
#pragma unroll
    for (int r_tile = 0; r_tile < TILES; ++r_tile) {
      if (r_tile >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t l = l0 + (warp * MINE + mine) * 16 + lane / 4 + i / 2 * 8;
        if (l >= p.L) continue;
        const float even = acc[mine][r_tile][i % 2][i / 2 * 2], odd = acc[mine][r_tile][i % 2][i / 2 * 2 + 1];
        const int column = i % 2 * 8 + lane % 4 * 2;
        const int64_t to = static_cast<int64_t>(blockIdx.x) * tiles.total + first + r_tile;
        if (p.by_column) {
          global<float>(p.part)[(to * 16 + column) * p.L + l] = even;
          global<float>(p.part)[(to * 16 + column + 1) * p.L + l] = odd;
        } else {
          *view<float2>(global<float>(p.part) + ((to * p.L + l) * 16 + column)) = make_float2(even, odd);
        }
      }
    }
  }
}

template <class Scalar, int TILES, bool P>
void launch_outer(const char* name, const Outer& p) {
  static_assert(kShared<Scalar, TILES, P> <= limits::kSharedMemory);
  const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>(cdiv(p.L, kOuterInputs<Scalar>)),
                  static_cast<unsigned>(cdiv(RankTiles(p).total, TILES)));
  launch(name, outer_kernel<Scalar, TILES, P>, grid, kThreads, kShared<Scalar, TILES, P>, p.stream, false, p);
}

}  // namespace

void outer(const char* name, const Outer& p) {
  const bool two = RankTiles(p).total <= 2;
  with_dtype(p.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    if (p.p_part == nullptr) {
      two ? launch_outer<Scalar, 2, false>(name, p) : launch_outer<Scalar, 4, false>(name, p);
    } else if constexpr (sizeof(Scalar) == 2) {
      two ? launch_outer<Scalar, 2, true>(name, p) : launch_outer<Scalar, 4, true>(name, p);
    } else {
      launch_outer<Scalar, 2, true>(name, p);  // four have no room in shared memory
    }
  });
}
