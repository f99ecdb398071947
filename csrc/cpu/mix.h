// The mix "smolora" in rank space on a CPU; smolora/engine/mixes.py has its equations.
#pragma once

#include "products.h"

namespace cpu {

template <class T>
struct Mix {
  Layout layout;
  bool shared;  // h has one slot a bank, whose A all slots share
  T scaling;
  const T* h;             // (T, 2, K, r), or (T, 2, 1, r)
  const T* w;             // (sum of E, r), s B^T I
  const T* slot_weights;  // (n, 2, K)
  T* fusion_logits;       // (T,)
  bool make_logits;       // write them; else they are given
  T* u;                   // (T, 2 K r), c h
  const T* p;             // (T, 2 K r), s B^T g
  T* dh;                  // as h
  T* dw;                  // (sum of E, r)
  T* dslot_weights;       // (n, 2, K), or null
  T* partial_dw;          // (n, 2, K, r), of each sequence
};

template <class T>
void mix(const Mix<T>& job);
template <class T>
void mix_backward(Mix<T> job);

}  // namespace cpu
