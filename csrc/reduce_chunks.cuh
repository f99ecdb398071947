// dA and dB, the gradients of A and B: the sum over tokens, from the partial sums that `outer` leaves for each chunk.
#pragma once

#include "tile.cuh"

// out = scale * sum over the chunks in which an expert was chosen + addend[row] factor[expert][rank].
struct ReduceChunks : Product {
  const float* part = nullptr;                  // `outer`'s
  const int* chunk_to_seq = nullptr;            // (chunks,)
  int64_t L = 0, chunks = 0;
  int64_t by_column = 0;
  double scale = 1;
  int64_t experts[limits::kBanks] = {};
  const uint8_t* trained[limits::kBanks] = {};  // (E,) or null: experts that are not get zeros
  Weight addend[limits::kBanks];                // (L,), or (experts, L) with own_addend
  int64_t own_addend = 0;
  const float* factor = nullptr;                // (sum E, r) or null
  Weight out[limits::kBanks];                   // (experts, L, r), or (experts, r, L) by columns; or null
  using Product::Product;
};

void reduce_chunks(const ReduceChunks& p);
