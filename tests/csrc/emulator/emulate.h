// A grid of thread blocks on the CPU, for tests: everything of ptx.cuh and of CUDA's own language that the kernels use,
// under the same names.
//
//   language.h  keywords, vector types, indices
//   fibers.h    threads, barriers, and the scheduler that finds deadlocks
//   pointers.h  memory: bounds, races on shared memory, cp.async
//   numbers.h   bf16 and fp16
//   emulate.h   operations of a warp, intrinsics, launches
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"
#include "language.h"
#include "numbers.h"
#include "pointers.h"

template <class T>
float half_of_word(uint32_t word, int which) {
  return to_float(T{static_cast<uint16_t>(which ? word >> 16 : word)});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(!std::is_same_v<T, float>);
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  std::memcpy(w.in[lane], a, 16);
  w.in[lane][4] = b0;
  w.in[lane][5] = b1;
  emulate::collective("mma", [](emulate::Warp& w) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * q + r / 2 * 8 + i] = half_of_word<T>(w.in[l][r], i);
        for (int r = 0; r < 2; ++r) b[2 * q + r * 8 + i][g] = half_of_word<T>(w.in[l][4 + r], i);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        w.out[l][i] = bits_of_float(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] += float_of_bits(w.out[lane][i]);
}

template <bool TRANSPOSED, class T>
void ldmatrix_x4(uint32_t (&r)[4], Ptr<const T> row) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.address[lane] = reinterpret_cast<const char*>(row.raw());
  emulate::check_access(w.address[lane], 16, row.low(), row.high());
  emulate::touch(w.address[lane], 16, false);
  emulate::collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", [](emulate::Warp& w) {
    for (int l = 0; l < 32; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[2];
        for (int i = 0; i < 2; ++i) {
          const int row = TRANSPOSED ? l % 4 * 2 + i : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + i;
          std::memcpy(&element[i], w.address[matrix * 8 + row] + 2 * column, 2);
        }
        std::memcpy(&w.out[l][matrix], element, 4);
      }
    }
  });
  std::memcpy(r, w.out[lane], 16);
}

inline float shuffle_xor(float v, int lanes) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.in[lane][0] = bits_of_float(v);
  w.in[lane][1] = lanes;
  emulate::collective("shuffle", [](emulate::Warp& w) {
    for (int l = 0; l < 32; ++l) w.out[l][0] = w.in[l ^ w.in[l][1]][0];
  });
  return float_of_bits(w.out[lane][0]);
}

inline uint32_t lanes_where(bool yes) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.in[lane][0] = yes;
  emulate::collective("ballot", [](emulate::Warp& w) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) bits |= w.in[l][0] << l;
    for (int l = 0; l < 32; ++l) w.out[l][0] = bits;
  });
  return w.out[lane][0];
}

#define __syncthreads() emulate::barrier(__FILE__, __LINE__, emulate::sync_block)
#define __syncwarp() emulate::barrier(__FILE__, __LINE__, emulate::sync_warp)
#define grid_barrier() emulate::barrier(__FILE__, __LINE__, emulate::sync_grid)
inline void __threadfence() {}
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }

inline uint32_t bytes_at_least(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) out |= (a >> i & 255) >= (b >> i & 255) ? 255u << i : 0;
  return out;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

template <class... P>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared, void*, bool cooperative,
            P... arguments) {
  if (threads % emulate::kWarp != 0) throw std::runtime_error(std::string(name) + ": threads must fill warps");
  if (shared > 99 * 1024) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) + " bytes of shared memory");
  }
  gridDim = grid;
  blockDim = dim3(threads);
  emulate::body = [=] { kernel(arguments...); };
  std::vector<dim3> ids;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) ids.push_back(dim3(x, y, z));
    }
  }
  if (cooperative) {
    if (!ids.empty()) emulate::run(name, ids, threads, shared);
    return;
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    emulate::run(name, {ids[emulate::reversed ? ids.size() - 1 - i : i]}, threads, shared);
  }
}

template <class... P>
int resident_blocks(const char*, void (*)(P...), int, size_t) {
  return emulate::processors;
}

inline void use_device(int) {}
