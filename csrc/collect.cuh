// The chunks' parts of an outer product, added up for each expert: the gradients of A and B.
#pragma once

#include "tile.cuh"

// The sum times `scale`, plus addend[row] factor[expert][rank].
struct Collect : Product {
  const float* part = nullptr;
  const int* chunk_to_seq = nullptr;  // (chunks,)
  int64_t L = 0, chunks = 0;
  int64_t by_column = 0;
  double scale = 1;
  int64_t experts[limits::kBanks] = {};
  const uint8_t* trained[limits::kBanks] = {};  // (E,) or null: experts that are not get zeros
  Weight addend[limits::kBanks];                // (L,)
  const float* factor = nullptr;                // (sum E, r) or null
  Weight out[limits::kBanks];                   // (experts, L, r), or (experts, r, L) by columns; or null
  using Product::Product;
};
void collect(const Collect& p);
