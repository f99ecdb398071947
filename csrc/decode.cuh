// Decode, one token a sequence: how the work of a projection is cut up, and the products with one row of a weight.
//
// A row is read once for all sequences that use it, four elements a load, from the parameters in their own dtype.
#pragma once

#include "mix.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = limits::kDecodeInputs;  // 32 lanes of kVectors vectors of 4
constexpr int kVectors = kSlice / 128;
constexpr int kLoads = 8;   // of a thread, in flight together: rows of B
constexpr int kParts = 24;  // the same of a sum: no fewer than LLaVA-7B's d has slices, 8 or 22
constexpr int kTokens = 2;  // that a row of A is multiplied with at a time
constexpr int kGroup = 16;  // sequences that a block expands at a time, at most
constexpr int kSums = 256;  // numbers of w that a block adds up at a time

struct Sizes {
  int n, K, r, E0, E, slots;        // E0 experts of the first bank, E of all
  int padded, columns;              // a slot's columns of rank space, and those of all slots
  int masks;                        // pairs of a slot and an expert of its bank
  int downs;                        // A that h is made of: one an expert, or one a bank
  int weights;                      // numbers of w
  int first_x, x_rows;              // rows of routers that read x, and of those that read the instruction, counted
  int first_e, e_rows;              // through the banks
  int outputs, k_slices, d_slices;  // outputs of a slice of k
  int group, groups;                // sequences that a block expands at a time, and how many times that is
  __host__ __device__ explicit Sizes(const Decode& p)
      : n(static_cast<int>(p.n)), K(static_cast<int>(p.K)), r(static_cast<int>(p.r)),
        E0(static_cast<int>(p.banks[0].E)), E(E0 + static_cast<int>(p.banks[1].E)), slots(static_cast<int>(p.b) * K),
        padded(rank16(r)), columns(slots * padded), masks(K * E), downs(p.shared ? static_cast<int>(p.b) : E),
        weights(p.mix == kSmolora ? E * r : 0), outputs(static_cast<int>(p.outputs)),
        k_slices(static_cast<int>(cdiv(p.k, outputs))), d_slices(static_cast<int>(cdiv(p.d, kSlice))) {
    const bool first = p.banks[0].router_reads_x, second = p.banks[1].router_reads_x;
    first_x = first ? 0 : E0;
    first_e = first ? E0 : 0;
    x_rows = p.routes ? (first ? E0 : 0) + (second ? E - E0 : 0) : 0;
    e_rows = p.routes ? E - x_rows : 0;
    const int fit = limits::kDecodeMixed / (columns + outputs), ranges = (n + kGroup - 1) / kGroup;
    const int even = (n + ranges - 1) / ranges;
    group = fit < 1 ? 1 : fit < even ? fit : even;
    groups = (n + group - 1) / group;
  }
  // What a projection's blocks share out: slices of k, then rows of A and of the routers of x by slices of d, then
  // logits of the routers of the instruction. Of A only the rows of experts in use count, which the device alone knows.
  __host__ __device__ int w_items() const { return weights > 0 ? k_slices : 0; }
  __host__ __device__ int dots(int rows) const { return static_cast<int>(cdiv(rows + x_rows, kWarps)) * d_slices; }
  __host__ __device__ int logits() const { return static_cast<int>(cdiv(n * e_rows, kWarps)); }
};

// The sum of `count` numbers, `stride` apart, in their order.
__device__ __forceinline__ float strided_sum(Ptr<const float> from, int count, int stride) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < count; i += kParts) {
    float v[kParts];
#pragma unroll
    for (int j = 0; j < kParts; ++j, from = from + stride) v[j] = i + j < count ? *from : 0.0f;
#pragma unroll
    for (int j = 0; j < kParts; ++j) sum += v[j];
  }
  return sum;
}

// Readers of a weight, four elements at a time: by one load where all rows of a launch allow that (WIDE), else one by
// one.
template <class W>
struct Vectors {
  static constexpr int kRows = kLoads;  // in flight together
  using Value = W;
  const void* data;
  __device__ __forceinline__ Vectors of(const Weight& other) const { return {other.data}; }
  __device__ __forceinline__ W one(int64_t i, bool inside) const { return inside ? global<const W>(data)[i] : W(); }
  __device__ __forceinline__ Four<W> take(int64_t i, int count) const {
    return count > 0 ? *view<const Four<W>>(global<const W>(data) + i) : Four<W>();  // rows are a multiple of 4 long
  }
};
struct Elements {
  static constexpr int kRows = 1;
  using Value = float;
  Weight weight;
  __device__ __forceinline__ Elements of(const Weight& other) const { return {other}; }
  __device__ __forceinline__ float one(int64_t i, bool inside) const { return inside ? weight_at(weight, i) : 0.0f; }
  __device__ __forceinline__ float4 take(int64_t i, int count) const {
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = j < count ? weight_at(weight, i + j) : 0.0f;
    return float4{v[0], v[1], v[2], v[3]};
  }
};

inline bool is_wide(const Decode& p) {
  bool wide = p.d % 4 == 0 && p.r % 4 == 0 && is_aligned(p.x, 16);
  for (int bank = 0; bank < p.b; ++bank) {
    const Bank& of = p.banks[bank];
    wide = wide && of.B.dtype == p.banks[0].B.dtype && (p.mix != kSmolora || of.importance.dtype == of.B.dtype);
    for (const Weight& weight : {of.A, of.B, of.router_reads_x ? of.router : Weight()}) {
      wide = wide && is_aligned(weight.data, 16) && weight.dtype != kFloat64;
    }
  }
  return wide;
}

// Calls f with the reader of a weight.
template <bool WIDE, class F>
__device__ __forceinline__ void with_reader(const Weight& weight, F f) {
  if constexpr (WIDE) {
    switch (weight.dtype) {
      case kFloat32: return f(Vectors<float>{weight.data});
      case kFloat16: return f(Vectors<fp16>{weight.data});
      default: return f(Vectors<bf16>{weight.data});
    }
  } else {
    f(Elements{weight});
  }
}

// A warp's product of a slice of one row of A, or of the router, from element `from` on, with those of the tokens in
// `here`, to out[i * stride]. A token that does not route counts as zeros for the router.
template <class Scalar, bool WIDE, class Reader>
__device__ __forceinline__ void dot_item(const Decode& p, const Reader& weight, int64_t from, bool router, int slice,
                                         uint64_t here, int lane, Ptr<float> out, int stride) {
  const int count = min(static_cast<int>(p.d) - slice * kSlice, kSlice) - lane * 4;
  const auto x = global<const Scalar>(p.x) + (slice * kSlice + lane * 4);
  Four<typename Reader::Value> row[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) row[v] = weight.take(from + lane * 4 + v * 128, count - v * 128);
  int at[kTokens], many;
  Four<Scalar> tokens[kTokens][kVectors];
  const auto take_tokens = [&] {
    many = 0;
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      at[j] = here == 0 ? 0 : __ffsll(static_cast<long long>(here)) - 1;
      many += here != 0;
      const bool seen = here != 0 && (!router || p.route_mask == nullptr || global<const uint8_t>(p.route_mask)[at[j]]);
      here &= here - 1;
      const auto token = x + at[j] * p.d;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int left = seen ? count - v * 128 : 0;
        if (WIDE) {
          tokens[j][v] = left > 0 ? *view<const Four<Scalar>>(token + v * 128) : Four<Scalar>();
        } else {
          alignas(16) Scalar four[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) four[i] = i < left ? token[v * 128 + i] : Scalar();
          tokens[j][v] = *reinterpret_cast<const Four<Scalar>*>(four);
        }
      }
    }
  };
  take_tokens();
  float a[kVectors][4];  // only now, so that row and tokens are in flight together
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    unpack<typename Reader::Value>(a[v], row[v]);
    if (!router) round4<Scalar>(a[v]);
  }
  for (;;) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (j >= many) continue;
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float t[4];
        unpack<Scalar>(t, tokens[j][v]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += a[v][i] * t[i];
      }
      sum = warp_sum(sum);
      if (lane == 0) out[at[j] * stride] = sum;
    }
    if (here == 0) break;
    take_tokens();
  }
}

// A block's part of w = s B^T I, for `used` experts of a list, over a slice of k; `reader` reads weights of B's dtype.
template <class Scalar, class Reader>
__device__ __forceinline__ void add_w(const Decode& p, const Sizes& s, const Reader& reader, Ptr<const int> list,
                                      int used, int64_t first_output, int outputs, Ptr<float> scratch,
                                      Ptr<float> out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = s.r;
  int quads = 1;  // threads that share a row: a power of two, 4 ranks each
  while (quads * 4 < r) quads *= 2;
  const int rows = kThreads / quads, quad = threadIdx.x % quads, first = threadIdx.x / quads;
  const int steps = static_cast<int>(cdiv(s.outputs, rows)), at_a_time = kSums / r;
  for (int base = 0; base < used; base += at_a_time) {
    const int count = min(used - base, at_a_time);
    float sum[4] = {0, 0, 0, 0};
    int loaded = 0, load_step = 0, added = 0, add_step = 0;  // experts, and steps of the next one
    for (int left = count * steps; left > 0; left -= Reader::kRows) {
      Four<typename Reader::Value> v[Reader::kRows];
      typename Reader::Value importance[Reader::kRows];
#pragma unroll
      for (int j = 0; j < Reader::kRows; ++j) {
        const int expert = list[base + min(loaded, count - 1)], row = load_step * rows + first;
        const bool second = expert >= s.E0, inside = j < left && row < outputs;
        const Reader B = reader.of(second ? p.banks[1].B : p.banks[0].B);
        const Reader I = reader.of(second ? p.banks[1].importance : p.banks[0].importance);
        const int64_t in_bank = second ? expert - s.E0 : expert, output = first_output + row;
        v[j] = B.take((in_bank * p.k + output) * r + quad * 4, inside ? r - quad * 4 : 0);
        importance[j] = I.one((p.own_importance ? in_bank * p.k : 0) + output, inside);
        if (++load_step == steps) load_step = 0, ++loaded;
      }
#pragma unroll
      for (int j = 0; j < Reader::kRows; ++j) {
        if (j >= left) continue;
        const int row = add_step * rows + first;
        if (row < outputs) {
          const float here = rounded<Scalar>(to_float(importance[j]));
          float four[4];
          unpack<typename Reader::Value>(four, v[j]);
          round4<Scalar>(four);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += four[i] * here;
        }
        if (++add_step < steps) continue;
        for (int lanes = 16; lanes >= quads; lanes /= 2) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] += shuffle_xor(sum[i], lanes);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (lane < quads && quad * 4 + i < r) scratch[warp * kSums + added * r + quad * 4 + i] = sum[i];
          sum[i] = 0;
        }
        add_step = 0, ++added;
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count * r; c += kThreads) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += scratch[i * kSums + c];
      out[list[base + c / r] * r + c % r] = static_cast<float>(p.scaling) * total;
    }
    __syncthreads();
  }
}

// y of one output, y[g * outputs], += a slot's share of it, for the sequences of a group from `begin` on that the
// thread has, the bits of `taken`. The next row of B is loaded before the last one is used.
template <class Scalar, class Reader>
__device__ __forceinline__ void expand_slot(const Decode& p, const Sizes& s, const Reader& B, int experts,
                                            int64_t output, Ptr<const uint64_t> masks, int begin, uint64_t taken,
                                            Ptr<const float> u, Ptr<float> y) {
  const auto users_of = [&](int e) { return masks[e] >> begin & taken; };
  int e = -1, rank = s.r;  // of the row in `next`: 16 ranks of an output
  Four<typename Reader::Value> next[4];
  const auto take_next = [&] {
    rank += 16;
    if (rank >= s.r) {
      rank = 0;
      for (++e; e < experts && users_of(e) == 0;) ++e;
    }
    const auto row = (output + e * p.k) * s.r + rank;
#pragma unroll
    for (int j = 0; j < 4; ++j) next[j] = B.take(row + j * 4, e < experts ? s.r - rank - j * 4 : 0);
  };
  take_next();
  while (e < experts) {
    const int expert = e, first = rank;
    Four<typename Reader::Value> v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = next[j];
    take_next();
    float row[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unpack<typename Reader::Value>(row[j], v[j]);
      round4<Scalar>(row[j]);
    }
    for (uint64_t left = users_of(expert); left != 0;) {  // two at a time
      const int one = __ffsll(static_cast<long long>(left)) - 1;
      left &= left - 1;
      const int other = left == 0 ? one : __ffsll(static_cast<long long>(left)) - 1;
      left &= left - 1;
      float sums[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 with = *view<const float4>(u + ((i ? other : one) * s.columns + first + j * 4));
          sums[i] += row[j][0] * with.x + row[j][1] * with.y;
          sums[i] += row[j][2] * with.z + row[j][3] * with.w;
        }
      }
      y[one * s.outputs] += sums[0];
      if (other != one) y[other * s.outputs] += sums[1];
    }
  }
}
