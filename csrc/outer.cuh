// Partial gradients of A and B: the outer product of tokens with rank space, summed over a chunk of a sequence's
// tokens; reduce_chunks adds the chunks up.
//
// With `p_part`, the product of the same tokens with rows of weights comes from the same read, without dropout.
#pragma once

#include "tile.cuh"

struct Outer : Product {        // with p_part, `weights` (E, L, RP)
  const void* src = nullptr;    // (T, L)
  const void* u = nullptr;      // (T, 16 tiles)
  int64_t L = 0, chunk = 0, chunks = 0;
  int64_t need_sums = 1;        // else p_part alone
  int64_t by_column = 0;        // parts are (chunks, 16 tiles, L), else (chunks, tiles, L, 16)
  float* part = nullptr;        // out
  int* chunk_to_seq = nullptr;  // (chunks,) out: -1 if it has no token
  float* p_part = nullptr;      // (blocks of L, T, 16 tiles) out, or null
  using Product::Product;
};

void outer(const char* name, const Outer& p);

template <class Scalar>
constexpr int kOuterInputs = limits::kOuterTiles * kColumns<Scalar>;  // of L that a block has
