// Device functions that the kernels share: weights of any dtype, dropout's masks, top-k, tiles of tokens.
#pragma once

#include <type_traits>

#include "params.h"
#include "ptx.cuh"

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Columns that an expert takes in rank space: its rank, rounded up to the 16 of a tensor core.
__host__ __device__ constexpr int rank16(int64_t r) { return static_cast<int>(cdiv(r, 16) * 16); }

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}

// Element i of a weight in float32.
__device__ __forceinline__ float weight_at(Weight w, int64_t i) {
  switch (w.dtype) {
    case kFloat32: return global<const float>(w.data)[i];
    case kFloat16: return to_float(global<const fp16>(w.data)[i]);
    case kBfloat16: return to_float(global<const bf16>(w.data)[i]);
    default: return static_cast<float>(global<const double>(w.data)[i]);
  }
}

// Four elements, as the type that one load returns.
template <class Scalar>
using Four = std::conditional_t<sizeof(Scalar) == 4, float4, uint2>;

template <class Scalar>
__device__ __forceinline__ void unpack(float (&v)[4], const Four<Scalar>& four) {
  const Scalar* element = reinterpret_cast<const Scalar*>(&four);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = to_float(element[j]);
}

// Elements i to i + 3 in float32, zeros from the `count`-th on; `aligned`: they start where one load can take them.
template <class Scalar>
__device__ __forceinline__ void load4(float (&v)[4], Ptr<const Scalar> p, int64_t i, int64_t count, bool aligned) {
  if (!aligned || count < 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = j < count ? to_float(p[i + j]) : 0.0f;
  } else {
    unpack<Scalar>(v, *view<const Four<Scalar>>(p + i));
  }
}
__device__ __forceinline__ void load4(float (&v)[4], Weight w, int64_t i, int64_t count, bool aligned) {
  switch (w.dtype) {
    case kFloat32: return load4(v, global<const float>(w.data), i, count, aligned);
    case kFloat16: return load4(v, global<const fp16>(w.data), i, count, aligned);
    case kBfloat16: return load4(v, global<const bf16>(w.data), i, count, aligned);
    default:
      for (int j = 0; j < 4; ++j) v[j] = j < count ? weight_at(w, i + j) : 0.0f;
  }
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

__device__ __forceinline__ void set_weight(Weight w, int64_t i, float v) {
  switch (w.dtype) {
    case kFloat32: global<float>(w.data)[i] = v; break;
    case kFloat16: global<fp16>(w.data)[i] = from_float<fp16>(v); break;
    case kBfloat16: global<bf16>(w.data)[i] = from_float<bf16>(v); break;
    default: global<double>(w.data)[i] = static_cast<double>(v);
  }
}

// v, rounded to the compute dtype.
template <class Scalar>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<Scalar>(v));
}

// Rounds four numbers to the compute dtype.
template <class Scalar>
__device__ __forceinline__ void round4(float (&v)[4]) {
  round_pair<Scalar>(v[0], v[1]);
  round_pair<Scalar>(v[2], v[3]);
}

// A warp's product of `count` elements of a from the i-th on with those of b from the j-th on.
__device__ __forceinline__ float warp_dot(const Weight& a, int64_t i, const Weight& b, int64_t j, int64_t count) {
  float sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % 32; c < count; c += 32) sum += weight_at(a, i + c) * weight_at(b, j + c);
  return warp_sum(sum);
}

// A block's part of an expert's w = s B^T I, (r,), over rows `begin` to `end` of B; `scratch` has 4 THREADS elements.
// Weights are passed by reference: nvcc could not tell that a copy points to global memory.
template <class Scalar, int THREADS>
__device__ __forceinline__ void add_w_part(const Layout& p, const Weight& B, const Weight& importance, int64_t k,
                                           int64_t expert, int64_t begin, int64_t end, Ptr<float> scratch,
                                           Ptr<float> out) {
  const int r = static_cast<int>(p.r), quads = static_cast<int>(cdiv(r, 4)), rows = THREADS / quads;
  const int quad = threadIdx.x % quads, first = threadIdx.x / quads;  // a thread has 4 ranks of some rows
  const bool aligned = r % 4 == 0 && is_aligned(B.data, 16);
  float sum[4] = {0, 0, 0, 0};
  if (first < rows) {
#pragma unroll 4
    for (int64_t row = begin + first; row < end; row += rows) {
      float v[4];
      load4(v, B, (expert * k + row) * r + quad * 4, r - quad * 4, aligned);
      const float with = rounded<Scalar>(weight_at(importance, (p.own_importance ? expert * k : 0) + row));
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += rounded<Scalar>(v[j]) * with;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) scratch[threadIdx.x * 4 + j] = sum[j];
  __syncthreads();
  for (int rank = threadIdx.x; rank < r; rank += THREADS) {
    float total = 0;
    for (int row = 0; row < rows; ++row) total += scratch[(row * quads + rank / 4) * 4 + rank % 4];
    out[rank] = static_cast<float>(p.scaling) * total;
  }
}

// Dropout's mask of 16 columns of a row, bit j for column 16 block + j, 1 where an element stays: Philox4x32-10 with
// counter (block, row low, row high, stream) and key = seed; byte j of its output is compared with the threshold.
__device__ __forceinline__ uint32_t keep_bits(int64_t seed, int64_t row, uint32_t block, uint32_t stream,
                                              uint32_t threshold) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_a = __umulhi(0xD2511F53u, c0), low_a = 0xD2511F53u * c0;
    const uint32_t high_b = __umulhi(0xCD9E8D57u, c2), low_b = 0xCD9E8D57u * c2;
    c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint32_t least = threshold * 0x01010101u;
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a bit of each byte, brought together by the product's top byte
    const uint32_t kept = bytes_at_least(words[i], least) & 0x08040201u;
    bits |= (kept * 0x01010101u >> 24) << 4 * i;
  }
  return bits;
}

// Chooses the top K of z (E,), ties to the lowest; the weights are the softmax over the chosen, or with `gate_all` over
// all. By one thread. Each chosen expert follows the one before in the order of falling logits and rising numbers.
__device__ __forceinline__ void choose(Ptr<const float> z, int E, int K, bool gate_all, Ptr<int> ids,
                                       Ptr<float> weights) {
  float last = INFINITY, first = 0, total = 0;
  int last_expert = -1;
  for (int j = 0; j < K; ++j) {
    float best = -INFINITY;
    int expert = -1;
    for (int i = 0; i < E; ++i) {
      const bool follows = z[i] < last || (z[i] == last && i > last_expert);
      if (follows && (expert < 0 || z[i] > best)) best = z[i], expert = i;
    }
    if (expert < 0) expert = min(last_expert + 1, E - 1);  // a NaN follows nothing: stay inside
    if (j == 0) first = best;
    ids[j] = expert;
    weights[j] = expf(best - first);
    total += weights[j];
    last = best, last_expert = expert;
  }
  if (gate_all) {
    total = 0;
    for (int i = 0; i < E; ++i) total += expf(z[i] - first);
  }
  for (int j = 0; j < K; ++j) weights[j] = weights[j] / total;
}

// The expert in a slot of `ids` (n, b, K), or the slot's number where there are none; an empty slot counts as expert 0,
// with a weight of 0.
__device__ __forceinline__ int expert_in(Ptr<const int> ids, bool in_order, int64_t at, int slot) {
  return in_order ? slot : max(ids[at], 0);
}

// A tile of BT tokens of one sequence. A sequence of L tokens has (L + extra BT - 1) / BT tiles; those past its end are
// empty.
struct SeqTile {
  int seq;
  int64_t tile;        // its number in the sequence
  int64_t start, end;  // of the sequence
};

__device__ __forceinline__ int64_t tile_base(const Layout& p, int64_t seq, int BT, int extra) {
  return p.cu_seqlens != nullptr ? global<const int>(p.cu_seqlens)[seq] / BT + seq * extra
                                 : seq * ((p.T / p.n + extra * BT - 1) / BT);
}

__device__ __forceinline__ SeqTile tile_to_seq(const Layout& p, int64_t tile, int BT, int extra) {
  SeqTile at;
  if (p.cu_seqlens != nullptr) {
    const auto cu = global<const int>(p.cu_seqlens);
    int64_t low = 0, high = p.n;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (tile_base(p, middle, BT, extra) <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    at.seq = static_cast<int>(low);
    at.start = cu[low], at.end = cu[low + 1];
  } else {
    const int64_t S = p.T / p.n, i = tile / ((S + extra * BT - 1) / BT);
    at.seq = static_cast<int>(i);
    at.start = i * S, at.end = at.start + S;
  }
  at.tile = tile - tile_base(p, at.seq, BT, extra);
  return at;
}

// The sequence of a token.
__device__ __forceinline__ int seq_of(const Layout& p, int64_t token) {
  if (p.cu_seqlens == nullptr) return static_cast<int>(token / (p.T / p.n));
  const auto cu = global<const int>(p.cu_seqlens);
  int64_t low = 0, high = p.n;  // the last boundary that is not past the token
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return static_cast<int>(low);
}

// Number of tiles that cover all tokens; for packed sequences, whose lengths the host does not know, an upper bound.
inline int64_t tile_count(const Layout& p, int64_t BT, int64_t extra) {
  if (p.n == 0) return 0;
  return p.cu_seqlens != nullptr ? p.T / BT + extra * p.n : p.n * ((p.T / p.n + extra * BT - 1) / BT);
}

// Slots of a bank in h and dh.
__host__ __device__ inline int64_t down_slots(const Layout& p) { return p.shared ? 1 : p.K; }

// Calls f with a zero of the compute dtype.
template <class F>
void with_dtype(int64_t dtype, F f) {
  switch (dtype) {
    case kFloat32: f(float()); break;
    case kFloat16: f(fp16()); break;
    default: f(bf16());
  }
}
