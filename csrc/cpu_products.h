// The products between what is as wide as the layer and rank space, on a CPU: each reads or writes the wide array once,
// takes the experts from where they lie, and draws dropout's masks as it goes.
#pragma once

#include "cpu.h"

namespace cpu {

constexpr int kBanks = 2;

// How T tokens fall into n sequences, and which experts they use: slot j of bank b has the columns from (b K + j) r on
// of rank space, where K is 1 if the slots share an A.
struct Layout {
  int64_t tokens, seqs, banks, slots, rank;
  const int32_t* cu;   // (n + 1,), or null: all alike
  const int32_t* ids;  // (n, b, K), -1: empty; null: every expert in order
  int threads;

  int64_t columns() const { return banks * slots * rank; }
  int64_t begin(int64_t seq) const { return cu != nullptr ? cu[seq] : tokens / seqs * seq; }
  int64_t end(int64_t seq) const { return begin(seq + 1); }
  int64_t expert(int64_t seq, int64_t bank, int64_t slot) const {
    return ids == nullptr ? slot : ids[(seq * banks + bank) * slots + slot];
  }
};

// h = A dropout(x) / keep; in the backward dx = A^T dh and dA = dh^T dropout(x), where dh has that factor in it
template <class T>
struct Down {
  Layout at;
  int threshold;  // of dropout; 0: none
  uint64_t seed;
  uint32_t streams[kBanks];
  int64_t d;
  const T* A[kBanks];  // (E, r, d)
  int64_t experts[kBanks];
  const T* x;       // (T, d)
  T* h;             // (T, b K r)
  const T* dh;      // (T, b K r)
  T* dx;            // (T, d), or null
  T* dA[kBanks];    // as A, or null
};

// y = B u + bias; in the backward p = s B^T g and dB = g u^T
template <class T>
struct Up {
  Layout at;
  int64_t k;
  const T* B[kBanks];  // (E, k, r)
  int64_t experts[kBanks];
  const bool* trained[kBanks];  // (E,), or null: all
  T scaling;
  const T* u;     // (T, b K r)
  const T* bias;  // (k,), or null
  T* y;           // (T, k)
  const T* g;     // (T, k)
  T* p;           // (T, b K r), or null
  T* dB[kBanks];  // as B, or null
  T* parts;       // (groups, T, b K r): p of the groups of columns, before they are added up
};

// The scores' w = s B^T I of one bank; in the backward what c = dw brings: dB += s I c^T and dI = s B c
template <class T>
struct Scores {
  int64_t experts, k, rank;
  T scaling;
  const T* B;           // (E, k, r)
  const T* importance;  // (k,)
  T* w;                 // (E, r)
  const T* c;           // (E, r), in the backward
  T* dB;                // as B, or null
  T* dI;                // (k,), or null
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
