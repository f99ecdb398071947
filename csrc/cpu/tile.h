// Small dense products that keep a tile of the result in registers.
#pragma once

#include "common.h"

namespace cpu {

constexpr int kVectors = 2;  // vectors of a tile's row

template <class T, int Bytes>
constexpr int64_t kWidth = kVectors * int64_t(Bytes / sizeof(T));  // columns of a tile

template <int Bytes>
constexpr int kTileRows = Bytes == 64 ? 8 : Bytes == 32 ? 6 : 4;  // the sums of a tile stay in registers

INLINE int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// out (+)= sum over q of left[m, q] right[q, :], for Rows rows and one tile's width. Sums over q in order, then adds.
template <class T, int Bytes, int Rows>
INLINE void tile(int64_t inner, const T* left, int64_t row, int64_t step, const T* right, int64_t right_row, T* out,
                 int64_t out_row, bool add) {
  typedef typename Vector<T, Bytes>::type V;
  constexpr int kSize = Vector<T, Bytes>::kSize;
  V sums[Rows][kVectors] = {};
  for (int64_t q = 0; q < inner; ++q) {
    V here[kVectors];
    for (int v = 0; v < kVectors; ++v) here[v] = load<T, Bytes>(right + q * right_row + v * kSize);
    for (int m = 0; m < Rows; ++m) {
      const T factor = left[m * row + q * step];
      for (int v = 0; v < kVectors; ++v) sums[m][v] += factor * here[v];
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + m * out_row + v * kSize;
      store<T, Bytes>(to, add ? load<T, Bytes>(to) + sums[m][v] : sums[m][v]);
    }
  }
}

// Rows of a tile below one of Rows, for what is left of a product's rows.
template <int Rows>
constexpr int kFewer = Rows == 6 ? 4 : Rows / 2;

template <class T, int Bytes, int Rows>
INLINE void tile_rows(int64_t rows, int64_t columns, int64_t inner, const T* left, int64_t row, int64_t step,
                      const T* right, int64_t right_row, T* out, int64_t out_row, bool add) {
  for (; rows >= Rows; rows -= Rows, left += Rows * row, out += Rows * out_row) {
    for (int64_t c = 0; c < columns; c += kWidth<T, Bytes>) {
      tile<T, Bytes, Rows>(inner, left, row, step, right + c, right_row, out + c, out_row, add);
    }
  }
  if constexpr (Rows > 1) {
    if (rows) {
      tile_rows<T, Bytes, kFewer<Rows>>(rows, columns, inner, left, row, step, right, right_row, out, out_row, add);
    }
  }
}

// out (rows, columns) (+)= left right; left[m, q] lies at m row + q step. `columns` is a multiple of the tile's width,
// to which `right` (inner, columns) and `out` are padded.
template <class T, int Bytes>
INLINE void multiply(int64_t rows, int64_t columns, int64_t inner, const T* left, int64_t row, int64_t step,
                     const T* right, int64_t right_row, T* out, int64_t out_row, bool add) {
  tile_rows<T, Bytes, kTileRows<Bytes>>(rows, columns, inner, left, row, step, right, right_row, out, out_row, add);
}

// out[m, j] = left[m] . right[j] for Rows rows of left and Columns of right
template <class T, int Bytes, int Rows, int Columns>
INLINE void dots(int64_t inner, const T* left, int64_t left_row, const T* right, int64_t right_row, T scale, T* out,
                 int64_t out_row) {
  typedef typename Vector<T, Bytes>::type V;
  constexpr int kSize = Vector<T, Bytes>::kSize;
  V sums[Rows][Columns] = {};
  const int64_t whole = inner / kSize * kSize;
  for (int64_t q = 0; q < whole; q += kSize) {
    V here[Columns];
    for (int j = 0; j < Columns; ++j) here[j] = load<T, Bytes>(right + j * right_row + q);
    for (int m = 0; m < Rows; ++m) {
      const V other = load<T, Bytes>(left + m * left_row + q);
      for (int j = 0; j < Columns; ++j) sums[m][j] += other * here[j];
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int j = 0; j < Columns; ++j) {
      T rest = 0;
      for (int64_t q = whole; q < inner; ++q) rest += left[m * left_row + q] * right[j * right_row + q];
      out[m * out_row + j] = scale * (sum<T, Bytes>(sums[m][j]) + rest);
    }
  }
}

template <class T, int Bytes, int Rows>
INLINE void dot_rows(int64_t rows, int64_t columns, int64_t inner, const T* left, int64_t left_row, const T* right,
                     int64_t right_row, T scale, T* out, int64_t out_row) {
  for (; rows >= Rows; rows -= Rows, left += Rows * left_row, out += Rows * out_row) {
    int64_t j = 0;
    for (; j + 2 <= columns; j += 2) {
      dots<T, Bytes, Rows, 2>(inner, left, left_row, right + j * right_row, right_row, scale, out + j, out_row);
    }
    if (j < columns) {
      dots<T, Bytes, Rows, 1>(inner, left, left_row, right + j * right_row, right_row, scale, out + j, out_row);
    }
  }
  if constexpr (Rows > 1) {
    if (rows) {
      dot_rows<T, Bytes, kFewer<Rows>>(rows, columns, inner, left, left_row, right, right_row, scale, out, out_row);
    }
  }
}

}  // namespace cpu
