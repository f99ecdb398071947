// The product of rank space with rows of weights, out to y or dx: written once, 16 bytes at a time.
#pragma once

#include "tile.cuh"

struct Expand : Product {  // `weights` (E, L, RP) T
  const void* u = nullptr;        // (T, 16 tiles) T
  int64_t L = 0, split_k = 1;     // parts of L, which need no adding up
  const void* bias = nullptr;     // (L,) T or null
  const float* dmean = nullptr;   // (n, L) or null: added to the routed tokens
  const uint8_t* mask = nullptr;  // (T,) or null: the routed tokens
  void* out = nullptr;            // (T, L) T out
  using Product::Product;
};

void expand(const char* name, const Expand& p);
