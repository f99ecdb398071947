// What tests ask of the emulation, and kernels with a fault each that it has to find.

#include "params.h"
#include "ptx.cuh"

void emulate_allow(uintptr_t address, size_t bytes) {
  if (bytes) emulate::allowed[address] = std::max(emulate::allowed[address], bytes);
}
void emulate_forget() { emulate::allowed.clear(); }
void emulate_order(bool reversed) { emulate::reversed = reversed; }
void emulate_leave_out(const std::string& file, int line) {
  emulate::left_out_file = file;
  emulate::left_out_line = line;
}

namespace {

constexpr int kThreads = 64;

__global__ void one_leaves() {  // before a barrier that the others wait at
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void half_a_warp() {  // shuffles
  if (threadIdx.x % 32 < 16) shuffle_xor(1.0f, 1);
}
__global__ void different_operations() {  // in one warp
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    shuffle_xor(1.0f, 1);
  }
}
__global__ void one_block_leaves() {  // before the grid's barrier
  if (blockIdx.x == 1) return;
  grid_barrier();
}
__global__ void past_the_array() {
  SmemAllocator smem;
  auto a = smem.take<float>(kThreads);
  smem.take<float>(kThreads);
  a[threadIdx.x + 1] = 0;
}
__global__ void past_the_tensor(const float* p) { (void)(global<const float>(p) + 3)[kThreads - 3]; }
__global__ void misaligned(const float* p) { (void)*view<const float4>(global<const float>(p) + 1); }
__global__ void too_much_shared() {
  SmemAllocator smem;
  smem.take<float>(1000);
}
__global__ void unsynchronised(float* p) {  // reads what another thread may not have written yet
  SmemAllocator smem;
  auto a = smem.take<float>(kThreads);
  a[threadIdx.x] = 1;
  global<float>(p)[threadIdx.x] = a[kThreads - 1 - threadIdx.x];
}
__global__ void overwritten() {  // what another thread may still have to read
  SmemAllocator smem;
  auto a = smem.take<float>(kThreads);
  a[threadIdx.x] = 1;
  __syncthreads();
  const float other = a[kThreads - 1 - threadIdx.x];
  a[threadIdx.x] = other;
}
__global__ void across_warps() {  // a warp's barrier is none of the block
  SmemAllocator smem;
  auto a = smem.take<float>(kThreads);
  a[threadIdx.x] = 1;
  __syncwarp();
  (void)static_cast<float>(a[threadIdx.x ^ 1]);
  (void)static_cast<float>(a[threadIdx.x ^ 32]);
}
__global__ void by_a_shuffle() {  // which orders no memory
  SmemAllocator smem;
  auto a = smem.take<float>(kThreads);
  a[threadIdx.x] = 1;
  shuffle_xor(1.0f, 1);
  (void)static_cast<float>(a[threadIdx.x ^ 1]);
}
__global__ void unawaited(float* p) {  // reads what a cp.async may not have brought yet
  SmemAllocator smem;
  auto a = smem.take<float>(4);
  if (threadIdx.x == 0) {
    cp_async16(a, global<const float>(p));
    cp_async_commit();
    for (int i = 0; i < 4; ++i) global<float>(p)[i] = a[i];
    cp_async_wait<0>();
  }
}

}  // namespace

void emulate_self_test(int which) {
  alignas(16) static float p[kThreads];
  std::fill(p, p + kThreads, 0.0f);
  emulate_allow(reinterpret_cast<uintptr_t>(p), sizeof p);
  const size_t shared = 2 * kThreads * sizeof(float);
  switch (which) {
    case 0: return launch("one_leaves", one_leaves, dim3(1), kThreads, 0, nullptr, false);
    case 1: return launch("half_a_warp", half_a_warp, dim3(1), kThreads, 0, nullptr, false);
    case 2: return launch("different_operations", different_operations, dim3(1), kThreads, 0, nullptr, false);
    case 3: return launch("one_block_leaves", one_block_leaves, dim3(2), kThreads, 0, nullptr, true);
    case 4: return launch("past_the_array", past_the_array, dim3(1), kThreads, shared, nullptr, false);
    case 5: return launch<const float*>("past_the_tensor", past_the_tensor, dim3(1), kThreads, 0, nullptr, false, p);
    case 6: return launch<const float*>("misaligned", misaligned, dim3(1), kThreads, 0, nullptr, false, p);
    case 7: return launch("too_much_shared", too_much_shared, dim3(1), kThreads, 0, nullptr, false);
    case 8: return launch<float*>("unsynchronised", unsynchronised, dim3(1), kThreads, shared, nullptr, false, p);
    case 9: return launch("overwritten", overwritten, dim3(1), kThreads, shared, nullptr, false);
    case 10: return launch("across_warps", across_warps, dim3(1), kThreads, shared, nullptr, false);
    case 11: return launch("by_a_shuffle", by_a_shuffle, dim3(1), kThreads, shared, nullptr, false);
    default: launch<float*>("unawaited", unawaited, dim3(1), kThreads, shared, nullptr, false, p);
  }
  for (float v : p) {
    if (std::isnan(v)) throw std::runtime_error("NaN from shared memory that nobody had written");
  }
}
