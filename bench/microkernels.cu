// Microkernels of bench/calibrate.py: each times one thing that the throughput model otherwise assumes.
//
// A kernel runs ROUNDS rounds of a few independent instructions a warp, or of one chain, and the first thread writes the
// cycles. What is computed is written, too, so that the compiler keeps it.

#include <cstdint>

constexpr int ROUNDS = 256;
constexpr int UNROLL = 8;  // independent instructions of a round

namespace {

__device__ __forceinline__ void report(long long start, long long* cycles) {
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = clock64() - start;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace

// UNROLL products of 32 by 32 to 64 bits a round; `rounds` of them, for the clock takes a while to settle.
extern "C" __global__ void imad_wide(long long* cycles, uint64_t* out, uint32_t factor, int rounds) {
  uint64_t sums[UNROLL];
  for (int i = 0; i < UNROLL; ++i) sums[i] = threadIdx.x + i;
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      asm volatile("mad.wide.u32 %0, %1, %2, %0;" : "+l"(sums[i]) : "r"(static_cast<uint32_t>(sums[i])), "r"(factor));
    }
  }
  report(start, cycles);
  uint64_t sum = 0;
  for (int i = 0; i < UNROLL; ++i) sum += sums[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// UNROLL ldmatrix.x4 a round, 512 bytes each, without bank conflicts.
extern "C" __global__ void load_matrix(long long* cycles, uint64_t* out) {
  __shared__ __align__(128) uint32_t tile[UNROLL * 128];
  for (int i = threadIdx.x; i < UNROLL * 128; i += blockDim.x) tile[i] = i;
  __syncthreads();
  uint32_t sum = 0;
  const uint32_t from = shared_address(tile) + threadIdx.x % 32 * 16;
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    uint32_t v[UNROLL][4];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[i][0]), "=r"(v[i][1]), "=r"(v[i][2]), "=r"(v[i][3])
                   : "r"(from + i * 512));
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) sum += v[i][0] ^ v[i][3];
  }
  report(start, cycles);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// UNROLL stores of 16 bytes a thread and round to shared memory, each to a place of its own, or all but one would go.
extern "C" __global__ void store_shared(long long* cycles, uint64_t* out) {
  extern __shared__ __align__(128) uint32_t room[];
  const uint32_t to = shared_address(room) + threadIdx.x * 16;
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + i * 16 * blockDim.x), "r"(round) : "memory");
    }
  }
  report(start, cycles);
  out[blockIdx.x * blockDim.x + threadIdx.x] = room[threadIdx.x];
}

// ROUNDS barriers of a block.
extern "C" __global__ void barrier(long long* cycles, uint64_t* out) {
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) asm volatile("bar.sync 0;" ::: "memory");
  report(start, cycles);
  out[blockIdx.x * blockDim.x + threadIdx.x] = start;
}

// A chain of loads, each the place of the next one, past L1; `warm` loads go before those that are timed.
extern "C" __global__ void chase(long long* cycles, uint64_t* out, const uint32_t* next, int warm) {
  uint32_t at = 0;
  for (int i = 0; i < warm; ++i) asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(at) : "l"(next + at));
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(at) : "l"(next + at));
  }
  out[1] = at;  // before the clock is read: the last load has come
  report(start + (at & 0), cycles);
}

// All blocks read `words` times 16 bytes again and again, past L1.
extern "C" __global__ void read_l2(uint64_t* out, const uint4* from, int words, int rounds) {
  uint32_t sum = 0;
  const int threads = gridDim.x * blockDim.x, mine = blockIdx.x * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll 4
    for (int i = mine; i < words; i += threads) {
      uint4 v;
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from + i));
      sum += v.x ^ v.y ^ v.z ^ v.w;  // all four, or the load would be made narrower
    }
  }
  out[mine] = sum;
}

extern "C" __global__ void nothing() {}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A descriptor of a tile in shared memory without swizzle: rows of 8 by 16 bytes that lie one after another.
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
  const uint64_t address = shared_address(tile) >> 4 & 0x3FFF;
  return address | static_cast<uint64_t>(128 >> 4) << 16 | static_cast<uint64_t>(256 >> 4) << 32;
}

template <int COUNT>
__device__ __forceinline__ void fence(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D32(d) D4(d, 0), D4(d, 4), D4(d, 8), D4(d, 12), D4(d, 16), D4(d, 20), D4(d, 24), D4(d, 28)
#define NAMES32                                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// UNROLL products a round of 64 x 16 by 16 x COLUMNS, COLUMNS 8 or 64, A in shared memory or in registers.
template <int COLUMNS, bool A_SHARED>
__device__ __forceinline__ void wgmma(long long* cycles, uint64_t* out) {
  __shared__ __align__(1024) unsigned char tiles[8192];
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) tiles[i] = 0;
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float d[COLUMNS / 2] = {};
  const uint64_t a = descriptor(tiles), b = descriptor(tiles + 4096);
  const uint32_t r = threadIdx.x & 0;
  const long long start = clock64();
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    fence(d);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if constexpr (COLUMNS == 8 && A_SHARED) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : D4(d, 0)
                     : "l"(a), "l"(b));
      } else if constexpr (COLUMNS == 8) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %4, %4, %4}, %5, "
                     "1, 1, 1, 0;"
                     : D4(d, 0)
                     : "r"(r), "l"(b));
      } else if constexpr (A_SHARED) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES32 ", %32, %33, 1, 1, 1, 0, 0;"
                     : D32(d)
                     : "l"(a), "l"(b));
      } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES32
                     ", {%32, %32, %32, %32}, %33, 1, 1, 1, 0;"
                     : D32(d)
                     : "r"(r), "l"(b));
      }
    }
    asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
    fence(d);
  }
  report(start, cycles);
  float sum = 0;
  for (int i = 0; i < COLUMNS / 2; ++i) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = __float_as_uint(sum);
}

extern "C" __global__ void wgmma_8_shared(long long* cycles, uint64_t* out) { wgmma<8, true>(cycles, out); }
extern "C" __global__ void wgmma_8_registers(long long* cycles, uint64_t* out) { wgmma<8, false>(cycles, out); }
extern "C" __global__ void wgmma_64_shared(long long* cycles, uint64_t* out) { wgmma<64, true>(cycles, out); }
extern "C" __global__ void wgmma_64_registers(long long* cycles, uint64_t* out) { wgmma<64, false>(cycles, out); }

#endif
