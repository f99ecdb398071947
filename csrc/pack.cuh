// Weights brought into the shape that products read: rounded to the compute dtype, padded with zeros.
#pragma once

#include "primitives.cuh"

struct Packing {
  Weight from[limits::kBanks];  // (experts, rows, columns)
  void* to[limits::kBanks];     // (experts, to_rows, to_columns) T; null: this one stays as it is
  int64_t experts[limits::kBanks];
  int64_t rows, columns;        // of `from`
  int64_t to_rows, to_columns;
};

// Launches it for what has a place to go to; `transposed`: `to` has the columns of `from` as rows.
void pack(const Layout& p, Packing packing, bool transposed);

// The same for a weight of each bank, `Bank::A` or `Bank::B`, to its `padded`.
void pack(const Pass& p, Weight Bank::* weight, int64_t rows, int64_t columns, int64_t to_rows, int64_t to_columns,
          bool transposed);

// Where a product reads it then.
inline const void* packed(const Bank& bank, const Weight& weight) {
  return bank.padded != nullptr ? bank.padded : weight.data;
}
