// Dropout's masks on a CPU: the random stream of common.cuh, many counters at a time so that vectors hold them.

#include <algorithm>
#include <cstdint>
#include <cstring>

// the widest vectors of the CPU that it runs on, not of the one that compiled it
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST_VECTORS
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {

constexpr int kLanes = 64;  // fewer would be unrolled before they could be vectorised

// A mask of `count` counters (column block, row low, row high, stream), row by row, each for 16 columns: 1 where its byte
// of Philox4x32-10 with key `seed` reaches the threshold, else 0.
template <class T>
INLINE void fill(T* mask, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold) {
  int64_t row = 0, block = 0;
  for (int64_t done = 0; done < count; done += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      c0[lane] = block, c1[lane] = row, c2[lane] = row >> 32, c3[lane] = stream;
      if (++block == blocks) block = 0, ++row;
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

WIDEST_VECTORS void fill_float(float* mask, int64_t count, int64_t blocks, uint32_t stream,
                               uint64_t seed, int threshold) {
  fill(mask, count, blocks, stream, seed, threshold);
}
WIDEST_VECTORS void fill_double(double* mask, int64_t count, int64_t blocks, uint32_t stream,
                                uint64_t seed, int threshold) {
  fill(mask, count, blocks, stream, seed, threshold);
}

}  // namespace

namespace cpu {

void keep_mask(float* mask, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold) {
  fill_float(mask, count, blocks, stream, seed, threshold);
}
void keep_mask(double* mask, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold) {
  fill_double(mask, count, blocks, stream, seed, threshold);
}

}  // namespace cpu
