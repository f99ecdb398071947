#include "decode.h"

#include <cmath>

namespace cpu {
namespace {

constexpr int64_t kRows = 4;         // rows of A that a task takes
constexpr int64_t kChunk = 256;      // outputs that a task takes
constexpr int64_t kWork = 1 << 16;   // products that are worth a second thread

int64_t chunks(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// h of `kRows` rows of a slot's A
template <class T, int Bytes>
INLINE void down_body(const Decode<T>& job, int64_t task) {
  typedef typename Vector<T, Bytes>::type V;
  constexpr int kSize = Vector<T, Bytes>::kSize;
  const int64_t blocks = chunks(job.r, kRows), slots = job.shared ? 1 : job.slots;
  const int64_t first = task % blocks * kRows, slot = task / blocks;  // of all n b K slots
  const int64_t bank = slot / slots % job.banks;
  const int64_t expert = job.shared ? 0 : job.ids[slot];
  T* h = job.h + slot * job.r + first;
  const int64_t rows = std::min(kRows, job.r - first);
  if (expert < 0) return std::fill(h, h + rows, T(0));
  const T* x = job.x + slot / (job.banks * slots) * job.d;
  const T* A = job.A[bank] + (expert * job.r + first) * job.d;
  V sums[kRows] = {};
  const int64_t whole = job.d / kSize * kSize;
  if (rows == kRows) {
    for (int64_t i = 0; i < whole; i += kSize) {
      const V here = load<T, Bytes>(x + i);
      for (int row = 0; row < kRows; ++row) sums[row] += load<T, Bytes>(A + row * job.d + i) * here;
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      V total = {};
      for (int64_t i = 0; i < whole; i += kSize) total += load<T, Bytes>(A + row * job.d + i) * load<T, Bytes>(x + i);
      sums[row] = total;
    }
  }
  for (int row = 0; row < rows; ++row) {
    T rest = 0;
    for (int64_t i = whole; i < job.d; ++i) rest += A[row * job.d + i] * x[i];
    h[row] = sum<T, Bytes>(sums[row]) + rest;
  }
}
FOR_ALL_VECTORS(down, Decode)

// out[c] += weight B[c] . h for `count` rows of B (., r)
template <class T, int Bytes>
INLINE void add_rows(const T* B, const T* h, T weight, int64_t r, int64_t count, T* out) {
  typedef typename Vector<T, Bytes>::type V;
  constexpr int kSize = Vector<T, Bytes>::kSize;
  const int64_t whole = r / kSize * kSize;
  if (r == kSize) {
    const V right = load<T, Bytes>(h);
    for (int64_t c = 0; c < count; ++c) out[c] += weight * sum<T, Bytes>(load<T, Bytes>(B + c * r) * right);
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    V total = {};
    for (int64_t i = 0; i < whole; i += kSize) total += load<T, Bytes>(B + c * r + i) * load<T, Bytes>(h + i);
    T rest = 0;
    for (int64_t i = whole; i < r; ++i) rest += B[c * r + i] * h[i];
    out[c] += weight * (sum<T, Bytes>(total) + rest);
  }
}

// a chunk of one sequence's outputs: added to y, or with a fusion kept a bank each, with their part of the score
template <class T, int Bytes>
INLINE void up_body(const Decode<T>& job, int64_t task) {
  const int64_t blocks = chunks(job.k, kChunk), seq = task / blocks, first = task % blocks * kChunk;
  const int64_t count = std::min(kChunk, job.k - first);
  const bool fused = job.scores != nullptr;
  T out[kChunk];
  for (int64_t bank = 0; bank < job.banks; ++bank) {
    std::fill(out, out + count, T(0));
    for (int64_t j = 0; j < job.slots; ++j) {
      const int64_t slot = (seq * job.banks + bank) * job.slots + j;
      if (job.ids[slot] < 0) continue;
      const T weight = job.slot_weights == nullptr ? job.scaling : job.scaling * job.slot_weights[slot];
      const T* h = job.h + (job.shared ? seq * job.banks + bank : slot) * job.r;
      const T* B = job.B[bank] + (job.ids[slot] * job.k + first) * job.r;
      add_rows<T, Bytes>(B, h, weight, job.r, count, out);
    }
    if (fused) {
      const int64_t id = job.ids[(seq * job.banks + bank) * job.slots];
      const T* importance = job.importance[bank] + (job.own_importance[bank] && id >= 0 ? id * job.k : 0) + first;
      T score = 0;
      for (int64_t c = 0; c < count; ++c) score += out[c] * importance[c];
      job.partial[task * job.banks + bank] = score;
      std::copy(out, out + count, job.branch + (seq * job.banks + bank) * job.k + first);
    } else {
      T* y = job.y + seq * job.k + first;
      for (int64_t c = 0; c < count; ++c) y[c] += out[c];
    }
  }
}
FOR_ALL_VECTORS(up, Decode)

// sigmoid(z), which is 1 / (1 + exp(-z)) where that cannot overflow
template <class T>
T sigmoid(T z) {
  const T e = std::exp(-std::abs(z));
  return z < 0 ? e / (1 + e) : 1 / (1 + e);
}

template <class T>
void fuse(const Decode<T>& job, int64_t seq) {
  T score[kMaxBanks] = {};
  const int64_t blocks = chunks(job.k, kChunk);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int bank = 0; bank < 2; ++bank) score[bank] += job.partial[(seq * blocks + block) * 2 + bank];
  }
  const T logit = score[0] - score[1], alpha = sigmoid(logit), beta = sigmoid(-logit);
  job.scores[seq] = logit;
  const T *first = job.branch + seq * 2 * job.k, *second = first + job.k;
  T* y = job.y + seq * job.k;
  for (int64_t c = 0; c < job.k; ++c) y[c] += alpha * first[c] + beta * second[c];
}

}  // namespace

template <class T>
Slots decode(Decode<T> job) {
  Slots found = kPlain;
  for (int64_t slot = 0; slot < job.n * job.banks * job.slots; ++slot) {
    const int32_t id = job.ids[slot];
    if (id < -1 || id >= job.experts[slot / job.slots % job.banks]) return kOutOfRange;
    if (id < 0) found = kEmpty;
  }
  const int64_t down_slots = job.n * job.banks * (job.shared ? 1 : job.slots);
  const int64_t outputs = job.n * chunks(job.k, kChunk);
  const bool fused = job.scores != nullptr;
  std::vector<T> h(down_slots * job.r), branch(fused ? job.n * job.banks * job.k : 0), partial(outputs * job.banks);
  job.h = h.data(), job.branch = branch.data(), job.partial = partial.data();
  const auto threads = [&](int64_t work) { return work < kWork ? 1 : job.threads; };
  parallel(down_slots * chunks(job.r, kRows), threads(down_slots * job.r * job.d),
           [&](int64_t task) { down(job, task); });
  parallel(outputs, threads(job.n * job.banks * job.slots * job.k * job.r), [&](int64_t task) { up(job, task); });
  if (fused) parallel(job.n, threads(job.n * job.k * 4), [&](int64_t seq) { fuse(job, seq); });
  return found;
}

template Slots decode<float>(Decode<float>);
template Slots decode<double>(Decode<double>);

}  // namespace cpu
