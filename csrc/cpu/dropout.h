// Dropout's masks on a CPU, as a whole array.
#pragma once

#include "common.h"

namespace cpu {

template <class T>
struct Mask {
  T* mask;  // (rows, 16 blocks): 1 where an element is kept, else 0
  int64_t rows, blocks;
  uint32_t stream;
  uint64_t seed;
  int threshold, threads;
};

template <class T>
void fill(const Mask<T>& job);

}  // namespace cpu
