// Thin wrappers of hardware instructions, shared memory and launches: the only file with PTX in it.
//
// Compiled by g++ with SMOLORA_EMULATE, the emulate.h of the tests gives the same names on the CPU. Ptr<T> is T* here
// and a pointer that checks its bounds there, so kernels take all memory, global and shared, through Ptr.
#pragma once

#include <cstdint>

#include "params.h"

#ifdef SMOLORA_EMULATE
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
using Ptr = T*;

// A pointer from a params struct.
template <class T>
__device__ __forceinline__ Ptr<T> global(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

// The same memory as another type.
template <class U, class T>
__device__ __forceinline__ Ptr<U> view(T* p) {
  return reinterpret_cast<U*>(p);
}

// Hands out the block's shared memory piece by piece; a piece starts at a multiple of 16 bytes.
class SmemAllocator {
 public:
  __device__ __forceinline__ SmemAllocator() {
    extern __shared__ __align__(128) unsigned char bytes[];
    next_ = bytes;
  }
  template <class T>
  __device__ __forceinline__ Ptr<T> take(int count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }

 private:
  unsigned char* next_;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float v) {
  return __float2half_rn(v);
}

// Rounds two numbers to T, by one conversion where T has 16 bits: single conversions use a slower unit.
template <class T>
__device__ __forceinline__ void round_pair(float&, float&) {}
template <>
__device__ __forceinline__ void round_pair<bf16>(float& a, float& b) {
  const float2 pair = __bfloat1622float2(__floats2bfloat162_rn(a, b));
  a = pair.x, b = pair.y;
}
template <>
__device__ __forceinline__ void round_pair<fp16>(float& a, float& b) {
  const float2 pair = __half22float2(__floats2half2_rn(a, b));
  a = pair.x, b = pair.y;
}

// d += a b, one 16x8 tile: a (16, 16) by rows, b (16, 8) by columns, in the registers that the PTX manual lays out.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16 bytes of shared memory.
template <bool TRANSPOSED, class T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const T* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// 16 bytes from global to shared memory, past the registers and the L1 cache.
template <class T>
__device__ __forceinline__ void cp_async16(T* to, const T* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xFFFFFFFFu, v, lanes); }

// A ballot: bit l is lane l's `yes`.
__device__ __forceinline__ uint32_t lanes_where(bool yes) { return __ballot_sync(0xFFFFFFFFu, yes); }

// Per byte: 0xFF where a >= b, else 0.
__device__ __forceinline__ uint32_t bytes_at_least(uint32_t a, uint32_t b) { return __vcmpgeu4(a, b); }

// ---- host side

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
  }
}

// Allows a kernel more shared memory than the default 48 KB. The limit is always the same: a smaller one, set by a
// later launch, would take memory from one that is captured in a graph.
template <class... P>
void allow_shared(const char* name, void (*kernel)(P...), size_t shared) {
  if (shared <= 48 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits::kSharedMemory), name);
}

// Launches a kernel; an error is thrown with its name. An empty grid is no launch.
template <class... P>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared, void* stream,
            bool cooperative, P... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared(name, kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Number of blocks of a kernel that are resident on the current device at once.
template <class... P>
int resident_blocks(const char* name, void (*kernel)(P...), int threads, size_t shared) {
  int device = 0, processors = 0, blocks = 0;
  allow_shared(name, kernel, shared);
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), name);
  return processors * blocks;
}

inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

#endif
