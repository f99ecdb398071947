// One token a sequence on a CPU: y += sum_j B[b_j] c_j A[a_j] x for slots that are known, with the fusion of two banks.
#pragma once

#include "common.h"

namespace cpu {

constexpr int kMaxBanks = 2;

template <class T>
struct Decode {
  const T* x;             // (n, d)
  T* y;                   // (n, k), added to
  const int32_t* ids;     // (n, b, K), -1: empty
  const T* slot_weights;  // (n, b, K), or null: 1
  const T* A[kMaxBanks];  // (E, r, d) of each bank, or (1, r, d)
  const T* B[kMaxBanks];  // (E, k, r)
  const T* importance[kMaxBanks];  // (k,), or (E, k) where K is 1, of both banks: mix "smolora"; null: mix "weighted"
  bool own_importance[kMaxBanks];  // whether it is of each expert
  T* scores;              // (n,), the fusion's logit of mix "smolora"
  int64_t n, d, k, r, banks, slots;
  int64_t experts[kMaxBanks];
  bool shared;  // one A for all B of a bank
  T scaling;
  int threads;
  // of one call
  T* h;        // (n, b, K, r), or (n, b, 1, r), A x
  T* branch;   // (n, b, k), s sum_j q_j B_j h_j, mix "smolora" alone
  T* partial;  // (n, chunks of k, b), I . branch over a chunk
};

enum Slots : int { kPlain = 0, kEmpty = 1, kOutOfRange = 2 };

// Returns what there is among the slots; where one is out of range, nothing has run.
template <class T>
Slots decode(Decode<T> job);

}  // namespace cpu
