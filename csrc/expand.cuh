// Rank space to y or dx, its product with rows of weights: written once, 16 bytes at a time.
#pragma once

#include "tile.cuh"

struct Expand : Product {               // `weights` (E, L, RP)
  const void* u = nullptr;              // (T, 16 tiles)
  int64_t L = 0, slices = 1;            // outputs; slices of them, each with blocks of its own
  const void* bias = nullptr;           // (L,) or null
  const float* dmean = nullptr;         // (n, L) or null: added to the routed tokens
  const uint8_t* route_mask = nullptr;  // (T,) or null: the routed tokens
  void* out = nullptr;                  // (T, L) out
  using Product::Product;
};

void expand(const char* name, const Expand& p);
