// Tiles in shared memory and the products of a warp over them, on tensor cores for 16-bit types and by fused
// multiply-adds for float32, in the same shapes and with the accumulators in the same places.
//
// A tile has rows of 128 bytes, whose chunks of 16 bytes are permuted by the row's number: the eight rows that a
// ldmatrix reads, and the eight rows at one column that float32 lanes read, lie in different banks.
//
// Accumulators of 16x16 products, float[2][4]: [j][i] is row lane / 4 + i / 2 * 8, column j * 8 + lane % 4 * 2 + i % 2.
#pragma once

#include "primitives.cuh"

constexpr int kStages = 3;  // tiles in flight or in use

template <class Scalar>
constexpr int kColumns = limits::kRow / sizeof(Scalar);  // of a tile
template <class Scalar>
constexpr int kChunk = 16 / sizeof(Scalar);  // elements of 16 bytes

// The index of an element in a tile.
template <class Scalar>
__device__ __forceinline__ unsigned place(unsigned row, unsigned column) {
  return row * kColumns<Scalar> + ((column / kChunk<Scalar> ^ row % 8) * kChunk<Scalar>) + column % kChunk<Scalar>;
}

// Loads 16 bytes into a tile: `valid` elements, then zeros. Commit and wait as for cp.async.
template <class Scalar>
__device__ __forceinline__ void load_chunk(Ptr<Scalar> to, Ptr<const Scalar> from, int64_t valid, bool aligned) {
  if (aligned && valid >= kChunk<Scalar>) {
    cp_async16(to, from);
  } else if (valid <= 0) {
    *view<uint4>(to) = uint4{0, 0, 0, 0};
  } else {
#pragma unroll
    for (int j = 0; j < kChunk<Scalar>; ++j) to[j] = j < valid ? from[j] : from_float<Scalar>(0.0f);
  }
}

// Brings in a tile of ROWS whole rows, `stride` elements apart. A thread has the same column in all of its rows: it
// computes its addresses once.
template <int ROWS, int THREADS, class Scalar>
__device__ __forceinline__ void load_tile(Ptr<Scalar> tile, Ptr<const Scalar> from, int64_t stride) {
  constexpr int STEP = THREADS / 8;
  static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "rows of a thread are permuted alike");
  const int row = threadIdx.x / 8, column = threadIdx.x % 8 * kChunk<Scalar>;
  const Ptr<Scalar> to = tile + place<Scalar>(row, column);
  const Ptr<const Scalar> mine = from + (row * stride + column);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) cp_async16(to + i * STEP * kColumns<Scalar>, mine + i * STEP * stride);
}

// The left operand of a product, 16 rows by 16 of what is summed over.
template <class Scalar>
struct Left {
  uint32_t r[4];
};
template <>
struct Left<float> {
  float r[2][16];
};

// Loads it from a tile [row][summed], or [summed][row] if TRANSPOSED, from row m and place k on.
template <bool TRANSPOSED, class Scalar>
__device__ __forceinline__ void load_left(Left<Scalar>& a, Ptr<const Scalar> tile, int m, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Scalar) == 2) {
    const int row = TRANSPOSED ? k + lane % 8 + lane / 16 * 8 : m + lane % 16;
    const int column = TRANSPOSED ? m + lane / 8 % 2 * 8 : k + lane / 16 * 8;
    ldmatrix_x4<TRANSPOSED, Scalar>(a.r, tile + place<Scalar>(row, column));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m + lane / 4 + i * 8;
#pragma unroll
      for (int j = 0; j < 16; j += 4) {
        if constexpr (TRANSPOSED) {
#pragma unroll
          for (int jj = 0; jj < 4; ++jj) a.r[i][j + jj] = tile[place<Scalar>(k + j + jj, row)];
        } else {
          const float4 four = *view<const float4>(tile + place<Scalar>(row, k + j));
          a.r[i][j] = four.x, a.r[i][j + 1] = four.y, a.r[i][j + 2] = four.z, a.r[i][j + 3] = four.w;
        }
      }
    }
  }
}

// acc += a b for 16 columns, with b from a tile [column][summed], or [summed][column] if TRANSPOSED.
template <bool TRANSPOSED, class Scalar>
__device__ __forceinline__ void multiply(float (&acc)[2][4], const Left<Scalar>& a, Ptr<const Scalar> tile, int n,
                                         int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(Scalar) == 2) {
    const int row = TRANSPOSED ? k + lane % 16 : n + lane % 8 + lane / 16 * 8;
    const int column = TRANSPOSED ? n + lane / 16 * 8 : k + lane / 8 % 2 * 8;
    uint32_t b[4];
    ldmatrix_x4<TRANSPOSED, Scalar>(b, tile + place<Scalar>(row, column));
    mma_m16n8k16<Scalar>(acc[0], a.r, b[0], b[1]);
    mma_m16n8k16<Scalar>(acc[1], a.r, b[2], b[3]);
  } else if constexpr (TRANSPOSED) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 b = *view<const float2>(tile + place<Scalar>(k + j, n + half * 8 + lane % 4 * 2));
        acc[half][0] += a.r[0][j] * b.x, acc[half][1] += a.r[0][j] * b.y;
        acc[half][2] += a.r[1][j] * b.x, acc[half][3] += a.r[1][j] * b.y;
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 b = *view<const float4>(tile + place<Scalar>(n + i / 2 * 8 + lane % 4 * 2 + i % 2, k + j));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float& sum = acc[i / 2][row * 2 + i % 2];
          sum += a.r[row][j] * b.x, sum += a.r[row][j + 1] * b.y;
          sum += a.r[row][j + 2] * b.z, sum += a.r[row][j + 3] * b.w;
        }
      }
    }
  }
}

// ---- dropout's masks of a tile, 16 columns in a number: keep[row * blocks + column / 16]

// Fills them for `rows` rows from `row` on and `blocks` blocks of columns from `block` on, by `threads` threads.
__device__ __forceinline__ void fill_keep(Ptr<uint16_t> keep, int rows, int blocks, const Layout& p, int64_t seed,
                                          int64_t row, int64_t block, int stream, int thread, int threads) {
  for (int i = thread; i < rows * blocks; i += threads) {
    keep[i] = static_cast<uint16_t>(keep_bits(seed, row + i / blocks, static_cast<uint32_t>(block + i % blocks), stream,
                                              static_cast<uint32_t>(p.threshold)));
  }
}

__device__ __forceinline__ uint32_t kept_pair(uint32_t low, uint32_t high) {
  return (low & 1 ? 0xFFFFu : 0u) | (high & 1 ? 0xFFFF0000u : 0u);
}

// Zeros what is dropped from a left operand that was loaded from [row][column] at row m and column 16 block.
template <class Scalar>
__device__ __forceinline__ void drop(Left<Scalar>& a, Ptr<const uint16_t> keep, int blocks, int m, int block) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = keep[(m + g + i * 8) * blocks + block];
    if constexpr (sizeof(Scalar) == 2) {
      a.r[i] &= kept_pair(bits >> 2 * q, bits >> (2 * q + 1));
      a.r[i + 2] &= kept_pair(bits >> (2 * q + 8), bits >> (2 * q + 9));
    } else {
#pragma unroll
      for (int j = 0; j < 16; ++j) a.r[i][j] = bits >> j & 1 ? a.r[i][j] : 0.0f;
    }
  }
}

// The same for one that was loaded transposed, from rows k on: its own rows are the tile's columns 16 block and on.
template <class Scalar>
__device__ __forceinline__ void drop_transposed(Left<Scalar>& a, Ptr<const uint16_t> keep, int blocks, int k,
                                                int block) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  if constexpr (sizeof(Scalar) == 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = keep[(k + 2 * q + i * 8) * blocks + block];
      const uint32_t high = keep[(k + 2 * q + i * 8 + 1) * blocks + block];
      a.r[2 * i] &= kept_pair(low >> g, high >> g);
      a.r[2 * i + 1] &= kept_pair(low >> (g + 8), high >> (g + 8));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const uint32_t bits = keep[(k + j) * blocks + block];
#pragma unroll
      for (int i = 0; i < 2; ++i) a.r[i][j] = bits >> (g + 8 * i) & 1 ? a.r[i][j] : 0.0f;
    }
  }
}

// ---- rank space, which has the slots of each bank side by side, RP columns each

// Which slots: those of h and dh, one a bank where its B share an A; or those of u and p, K a bank.
enum class Space { kDown, kUp };

// Experts' rows in the compute dtype, RP rows an expert or rows of RP columns, each starting at a multiple of 16 bytes.
struct WeightView {
  const void* bank[limits::kBanks] = {};
  int64_t expert = 0, row = 0;  // distances
};

// What the products between tokens and rank space have in common.
struct Product : Layout {
  int64_t slots[limits::kBanks] = {};     // of each bank
  int64_t in_order[limits::kBanks] = {};  // slot j has expert j, whatever `ids` say
  int64_t streams[limits::kBanks] = {};   // of dropout
  WeightView weights;                     // of the slots' experts, where there is a product with them

  Product(const Pass& p, Space space) : Layout(p) {
    for (int bank = 0; bank < p.b; ++bank) {
      slots[bank] = space == Space::kDown ? down_slots(p) : p.K;
      in_order[bank] = p.ids == nullptr || (space == Space::kDown && p.shared);
      streams[bank] = p.banks[bank].dropout_stream;
    }
  }
};

// Its tiles of 16 columns.
struct RankTiles {
  int first, total;  // of the first bank, and all
  __host__ __device__ explicit RankTiles(const Product& p) {
    const int per_slot = rank16(p.r) / 16;
    first = static_cast<int>(p.slots[0]) * per_slot;
    total = first + static_cast<int>(p.slots[1]) * per_slot;
  }
};

// The expert of a tile, by its number in the bank, and the tile's first rank.
__device__ __forceinline__ void expert_of_tile(const Product& p, const RankTiles& tiles, int seq, int tile,
                                               int64_t& expert, int& rank) {
  const int RP = rank16(p.r);
  const bool second = tile >= tiles.first;
  const int column = (second ? tile - tiles.first : tile) * 16, slot = column / RP;
  rank = column % RP;
  const bool in_order = second ? p.in_order[1] : p.in_order[0];
  expert = expert_in(global<const int>(p.ids), in_order, (seq * p.b + second) * p.K + slot, slot);
}
