// Weights as the products read them:
//
//   pad_kernel             rounds and pads
//   pad_transposed_kernel  transposes, too

#include "pad.cuh"

namespace {

constexpr int kThreads = 256;

// A row of `to` has `lanes` threads of a block, and a block kThreads / lanes rows.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1) pad_kernel(Padding p, int lanes) {
  const int thread = threadIdx.x, rows = kThreads / lanes;
  int64_t row = static_cast<int64_t>(blockIdx.x) * rows + thread / lanes;
  if (thread / lanes >= rows || row >= (p.experts[0] + p.experts[1]) * p.to_rows) return;
  const bool second = row >= p.experts[0] * p.to_rows;
  if (second) row -= p.experts[0] * p.to_rows;
  const Weight from = second ? p.from[1] : p.from[0];
  const int64_t expert = row / p.to_rows, from_row = row % p.to_rows;
  const auto to = global<Scalar>(second ? p.to[1] : p.to[0]) + row * p.to_columns;
  for (int64_t column = thread % lanes; column < p.to_columns; column += lanes) {
    const bool inside = from_row < p.rows && column < p.columns;
    to[column] = from_float<Scalar>(inside ? weight_at(from, (expert * p.rows + from_row) * p.columns + column) : 0.0f);
  }
}

// With rows and columns exchanged, 32 by 32 at a time through shared memory. Grid (columns, rows of `from`, experts).
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1) pad_transposed_kernel(Padding p) {
  SmemAllocator smem;
  auto tile = smem.take<float>(32 * 33);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * 32, column0 = static_cast<int64_t>(blockIdx.x) * 32;
  const bool second = blockIdx.z >= p.experts[0];
  const int64_t expert = second ? blockIdx.z - p.experts[0] : blockIdx.z;
  const Weight from = second ? p.from[1] : p.from[0];
  const auto to = global<Scalar>(second ? p.to[1] : p.to[0]);
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
      to[(expert * p.to_rows + row) * p.to_columns + column] = from_float<Scalar>(tile[lane * 33 + i]);
    }
  }
}

}  // namespace

void pad(const Layout& p, Padding padding, bool transposed) {
  for (int bank = 0; bank < limits::kBanks; ++bank) {
    if (padding.to[bank] == nullptr) padding.experts[bank] = 0;
  }
  const int64_t experts = padding.experts[0] + padding.experts[1];
  with_dtype(p.dtype, [&](auto zero) {
    using Scalar = decltype(zero);
    if (transposed) {
      const dim3 grid(static_cast<unsigned>(cdiv(padding.to_rows, 32)),
                      static_cast<unsigned>(cdiv(padding.to_columns, 32)), static_cast<unsigned>(experts));
      launch("pad", pad_transposed_kernel<Scalar>, grid, kThreads, 32 * 33 * 4, p.stream, false, padding);
    } else {
      const int lanes = static_cast<int>(std::min<int64_t>(padding.to_columns, kThreads));
      const auto blocks = static_cast<unsigned>(cdiv(experts * padding.to_rows, kThreads / lanes));
      launch("pad", pad_kernel<Scalar>, dim3(blocks), kThreads, 0, p.stream, false, padding, lanes);
    }
  });
}

void pad(const Pass& p, Weight Bank::* weight, int64_t rows, int64_t columns, int64_t to_rows, int64_t to_columns,
         bool transposed) {
  Padding padding{};
  for (int bank = 0; bank < p.b; ++bank) {
    padding.from[bank] = p.banks[bank].*weight;
    padding.to[bank] = p.banks[bank].padded;
    padding.experts[bank] = weight == &Bank::A && p.shared ? 1 : p.banks[bank].E;
  }
  padding.rows = rows;
  padding.columns = columns;
  padding.to_rows = to_rows;
  padding.to_columns = to_columns;
  pad(p, padding, transposed);
}
