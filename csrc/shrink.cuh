// Tokens into rank space: their product with rows of weights, split along the inputs; and their column sums.
#pragma once

#include "tile.cuh"

struct Shrink : Product {               // `weights` (E, RP, row)
  const void* src = nullptr;            // (T, L)
  int64_t L = 0;
  int64_t width = 0;                    // elements of a row of weights that may be read
  int64_t multiplies = 1;               // else it only sums
  int64_t split_k = 1;                  // parts of L
  float* part = nullptr;                // (split_k, T, 16 tiles) out
  float* sums = nullptr;                // (tiles of tokens, L) out, or null: over the routed tokens of a tile
  const uint8_t* route_mask = nullptr;  // (T,) or null
  const int64_t* routed = nullptr;      // (n, 2)
  using Product::Product;
};

// `columns`: of rank space that a block has, 32, 80 or 128; it sets how often the tokens are read.
void shrink(const Shrink& p, int64_t columns);
