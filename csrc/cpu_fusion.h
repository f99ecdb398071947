// The mix "smolora" in rank space on a CPU: mixes.py has its equations.
#pragma once

#include "cpu_products.h"

namespace cpu {

template <class T>
struct Fusion {
  Layout at;    // of the slots; ids are there
  bool shared;  // h has one slot a bank
  T scaling;
  int64_t experts[kBanks];
  const T* h;             // (T, 2, K, r), or (T, 2, 1, r)
  const T* w;             // (sum of E, r), s B^T I
  const T* slot_weights;  // (n, 2, K)
  T* logits;              // (T,), the fusion's: written in the forward
  T* u;                   // (T, 2 K r), s c h
  const T* p;             // (T, 2 K r), s B^T g
  T* dh;                  // as h
  T* dw;                  // (sum of E, r)
  T* dslot_weights;       // (n, 2, K), or null
  T* parts;               // (n, 2, K, r), dw of each sequence
};

// u, and with `fresh` the logits first
template <class T>
void fuse(const Fusion<T>& job, bool fresh);

// dh, dw and dslot_weights
template <class T>
void grad_fuse(Fusion<T> job);

}  // namespace cpu
