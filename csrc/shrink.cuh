// The product of tokens with rows of weights, into rank space, in parts over slices of the inputs; with column sums.
#pragma once

#include "tile.cuh"

struct Shrink : Product {  // `weights` (E, RP, row) T
  const void* src = nullptr;        // (T, L) T
  int64_t L = 0;
  int64_t width = 0;                // elements of a row of weights that may be read
  int64_t multiplies = 1;           // else it only sums
  int64_t split_k = 1;
  float* part = nullptr;            // (split_k, T, 16 tiles) out
  float* sums = nullptr;            // (tiles of tokens, L) out, or null: over the routed tokens of a tile
  const uint8_t* mask = nullptr;    // (T,) or null
  const int64_t* routed = nullptr;  // (n, 2)
  using Product::Product;
};

// Launches it with blocks of `columns` columns, which sets how often the tokens are read: 32, 80 or 128.
void shrink(const Shrink& p, int64_t columns);
