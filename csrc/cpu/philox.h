// Dropout's random stream, that of common.cuh, many counters at a time so that vectors hold them.
#pragma once

#include "common.h"

namespace cpu {

constexpr int kLanes = 64;  // counters at a time; fewer would be unrolled before they could be vectorised

// A mask (rows, 16 blocks): 1 where the byte of Philox4x32-10 with counter (column block, row low, row high, stream)
// and key `seed` reaches the threshold, else 0; of rows from `row` and column blocks from `block` on.
template <class T>
INLINE void keep_mask(T* mask, int64_t row, int64_t rows, int64_t block, int64_t blocks, uint32_t stream, uint64_t seed,
                      int threshold) {
  const int64_t count = rows * blocks;
  int64_t at = 0;
  for (int64_t done = 0; done < count; done += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      c0[lane] = block + at, c1[lane] = row, c2[lane] = row >> 32, c3[lane] = stream;
      if (++at == blocks) at = 0, ++row;
    }
    uint32_t k0 = seed, k1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t a = uint64_t{c0[lane]} * 0xD2511F53, b = uint64_t{c2[lane]} * 0xCD9E8D57;
        c0[lane] = uint32_t(b >> 32) ^ c1[lane] ^ k0;
        c2[lane] = uint32_t(a >> 32) ^ c3[lane] ^ k1;
        c1[lane] = b, c3[lane] = a;
      }
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    uint32_t words[kLanes][4];
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane][0] = c0[lane], words[lane][1] = c1[lane], words[lane][2] = c2[lane], words[lane][3] = c3[lane];
    }
    uint8_t bytes[16 * kLanes];
    std::memcpy(bytes, words, sizeof bytes);
    const int64_t width = 16 * std::min<int64_t>(kLanes, count - done);
    for (int64_t i = 0; i < width; ++i) mask[i] = bytes[i] >= threshold;
    mask += width;
  }
}

}  // namespace cpu
