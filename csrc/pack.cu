// Weights as products read them:
//
//   pack_kernel             rounded and padded
//   pack_transposed_kernel  and transposed

#include "pack.cuh"

namespace {

constexpr int kThreads = 256;

// A row of `to` has `lanes` threads of a block, and a block kThreads / lanes rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) pack_kernel(Packing p, int lanes) {
  const int thread = threadIdx.x, rows = kThreads / lanes;
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows + thread / lanes;
  if (thread / lanes >= rows || row >= (p.experts[0] + p.experts[1]) * p.to_rows) return;
  const bool second = row >= p.experts[0] * p.to_rows;
  if (second) row -= p.experts[0] * p.to_rows;
  const Weight from = second ? p.from[1] : p.from[0];
  const int64_t expert = row / p.to_rows, from_row = row % p.to_rows;
  const auto to = global<T>(second ? p.to[1] : p.to[0]) + row * p.to_columns;
  for (int64_t column = thread % lanes; column < p.to_columns; column += lanes) {
    const bool inside = from_row < p.rows && column < p.columns;
    to[column] = from_float<T>(inside ? weight_at(from, (expert * p.rows + from_row) * p.columns + column) : 0.0f);
  }
}

// With rows and columns exchanged, 32 by 32 at a time through shared memory. Grid (columns, rows of `from`, experts).
template <class T>
__global__ void __launch_bounds__(kThreads, 1) pack_transposed_kernel(Packing p) {
  SmemAllocator smem;
  auto tile = smem.take<float>(32 * 33);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * 32, column0 = static_cast<int64_t>(blockIdx.x) * 32;
  const bool second = blockIdx.z >= p.experts[0];
  const int64_t expert = second ? blockIdx.z - p.experts[0] : blockIdx.z;
  const Weight from = second ? p.from[1] : p.from[0];
  const auto to = global<T>(second ? p.to[1] : p.to[0]);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32) {
    const int64_t row = row0 + i, column = column0 + lane;
    const bool inside = row < p.rows && column < p.columns;
    tile[i * 33 + lane] = inside ? weight_at(from, (expert * p.rows + row) * p.columns + column) : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32) {
    const int64_t row = column0 + i, column = row0 + lane;  // of `to`
    if (row < p.to_rows && column < p.to_columns) {
      to[(expert * p.to_rows + row) * p.to_columns + column] = from_float<T>(tile[lane * 33 + i]);
    }
  }
}

}  // namespace

void pack(const Layout& p, Packing packing, bool transposed) {
  for (int bank = 0; bank < limits::kBanks; ++bank) {
    if (packing.to[bank] == nullptr) packing.experts[bank] = 0;
  }
  const int64_t experts = packing.experts[0] + packing.experts[1];
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (transposed) {
      const dim3 grid(static_cast<unsigned>(cdiv(packing.to_rows, 32)),
                      static_cast<unsigned>(cdiv(packing.to_columns, 32)), static_cast<unsigned>(experts));
      launch("pack", pack_transposed_kernel<T>, grid, kThreads, 32 * 33 * 4, p.stream, false, packing);
    } else {
      const int lanes = static_cast<int>(std::min<int64_t>(packing.to_columns, kThreads));
      const auto blocks = static_cast<unsigned>(cdiv(experts * packing.to_rows, kThreads / lanes));
      launch("pack", pack_kernel<T>, dim3(blocks), kThreads, 0, p.stream, false, packing, lanes);
    }
  });
}

void pack(const Pass& p, Weight Bank::* weight, int64_t rows, int64_t columns, int64_t to_rows, int64_t to_columns,
          bool transposed) {
  Packing packing{};
  for (int bank = 0; bank < p.b; ++bank) {
    packing.from[bank] = p.banks[bank].*weight;
    packing.to[bank] = p.banks[bank].padded;
    packing.experts[bank] = weight == &Bank::A && p.shared ? 1 : p.banks[bank].E;
  }
  packing.rows = rows;
  packing.columns = columns;
  packing.to_rows = to_rows;
  packing.to_columns = to_columns;
  pack(p, packing, transposed);
}
