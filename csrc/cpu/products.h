// The products between the wide arrays x, y and rank space, on a CPU. Each reads or writes its wide array once, takes
// the experts from where they lie, and draws dropout's masks as it goes.
#pragma once

#include "common.h"

namespace cpu {

constexpr int kBanks = 2;

// How T tokens fall into n sequences, and which experts these use. Slot j of bank b has the columns of rank space from
// (b K + j) r on; K is 1 where the slots share an A.
struct Layout {
  int64_t tokens, seqs, banks, slots, rank;
  int64_t experts[kBanks];
  const int32_t* cu_seqlens;  // (n + 1,), or null: sequences of equal length
  const int32_t* ids;         // (n, b, K), -1: an empty slot; null: every expert, in order
  int threads;

  int64_t columns() const { return banks * slots * rank; }
  int64_t begin(int64_t seq) const { return cu_seqlens != nullptr ? cu_seqlens[seq] : tokens / seqs * seq; }
  int64_t end(int64_t seq) const { return begin(seq + 1); }
  int64_t expert(int64_t seq, int64_t bank, int64_t slot) const {
    return ids == nullptr ? slot : ids[(seq * banks + bank) * slots + slot];
  }
};

// Between x and rank space. Forward: h = A dropout(x). grad_down, the products of the pass grad_input: dx = dropout(A^T dh) and dA = dh^T dropout(x), where dh has dropout's 1 / (1 - p)
template <class T>
struct Down {
  Layout layout;
  const T* A[kBanks];  // (E, r, d)
  int64_t d;
  int threshold;  // of dropout; 0: none
  uint64_t seed;
  uint32_t streams[kBanks];
  const T* x;     // (T, d)
  T* h;           // (T, b K r)
  const T* dh;    // (T, b K r)
  T* dx;          // (T, d), or null
  T* dA[kBanks];  // as A, or null
  const bool* trained[kBanks];  // (E,) or (1,), as A, of those that get a gradient; or null: all
};

// Between rank space and y. Forward: y = B u + bias. grad_up, the products of the pass grad_output: p = s B^T g and
// dB = g u^T, summed over tokens
template <class T>
struct Up {
  Layout layout;
  const T* B[kBanks];           // (E, k, r)
  const bool* trained[kBanks];  // (E,), or null: all
  int64_t k;
  T scaling;
  const T* u;     // (T, b K r)
  const T* bias;  // (k,), or null
  T* y;           // (T, k)
  const T* g;     // (T, k)
  T* p;           // (T, b K r), or null
  T* dB[kBanks];  // as B, or null
  T* partial_p;   // (groups of columns, T, b K r), before they are summed
};

// The scores' w = s B^T I of one bank; in the backward dB += s I dw^T, and dI = s sum of B dw
template <class T>
struct Scores {
  int64_t experts, k, rank;
  T scaling;
  const T* B;           // (E, k, r)
  const T* importance;  // (k,)
  T* w;                 // (E, r)
  const T* dw;          // (E, r)
  const bool* trained;  // (E,), or null: all
  T* dB;                // as B, or null
  T* dimportance;       // (k,), or null
  int threads;
};

template <class T>
void shrink(const Down<T>& job);
template <class T>
void grad_down(const Down<T>& job);
template <class T>
void expand(const Up<T>& job);
template <class T>
void grad_up(Up<T> job);
template <class T>
void scores(const Scores<T>& job);
template <class T>
void grad_scores(const Scores<T>& job);

}  // namespace cpu
