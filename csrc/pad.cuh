// Weights as the products read them: rounded to the compute dtype, and padded with zeros.
#pragma once

#include "primitives.cuh"

struct Padding {
  Weight from[limits::kBanks];  // (experts, rows, columns)
  void* to[limits::kBanks];     // (experts, to_rows, to_columns); null: this one stays as it is
  int64_t experts[limits::kBanks];
  int64_t rows, columns;        // of `from`
  int64_t to_rows, to_columns;
};

// Pads every `from` that has a `to`; `transposed`: `to` has the columns of `from` as rows.
void pad(const Layout& p, Padding padding, bool transposed);

// Pads a weight of each bank, `Bank::A` or `Bank::B`, into the bank's `padded`.
void pad(const Pass& p, Weight Bank::* weight, int64_t rows, int64_t columns, int64_t to_rows, int64_t to_columns,
         bool transposed);

// The padded weight of a bank, or the weight itself where it needs no padding.
inline const void* padded_weight(const Bank& bank, const Weight& weight) {
  return bank.padded != nullptr ? bank.padded : weight.data;
}
