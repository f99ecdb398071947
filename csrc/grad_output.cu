// g = dL/dy -> dh, dB and dI (the symbols are those of docs/architecture.md). In the order they run:
//
//   mix                        u = c h, again
//   pad                        B as the product reads it
//   outer                      the pass over g: partial dB, g times u summed over a chunk of tokens; and partial p
//   shrink                     partial p by another read of g, where the slots have too many columns for one read
//   mix_backward_kernel        dh from p; a tile's parts of dw and of the slot weights' gradient
//   reduce_dw_dweights_kernel  dw of every expert, and the slot weights' gradient of every sequence
//   reduce_chunks              dB of every expert: the sum over tokens
//   dimportance_kernel         dI

#include "mix.cuh"
#include "outer.cuh"
#include "pad.cuh"
#include "reduce_chunks.cuh"
#include "shrink.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kSumThreads = 512;  // few blocks, and long sums
constexpr int kWarps = kThreads / 32;

// Grid (tiles): a warp has every fourth token of a tile of a sequence. SHARED: dh adds up the slots that share an A.
template <class M, bool SHARED>
__global__ void __launch_bounds__(kThreads, 1) mix_backward_kernel(GradOutput p) {
  const int b = static_cast<int>(p.b), K = static_cast<int>(p.K), r = static_cast<int>(p.r);
  const int columns = b * K * r, RP = rank16(r), width = b * K * RP;
  SmemAllocator smem;
  auto p_of = smem.take<float>(kWarps * columns);   // p of each warp's token
  auto dw_of = smem.take<float>(kWarps * columns);  // sums over each warp's tokens
  auto dweights_of = smem.take<float>(kWarps * columns);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SeqTile at = tile_to_seq(p, blockIdx.x, limits::kMixTile, 1);
  const int64_t start = at.start + at.tile * limits::kMixTile;
  const int64_t end = min(at.end, start + limits::kMixTile);
  if (threadIdx.x == 0) global<int>(p.tile_to_seq)[blockIdx.x] = start < end ? at.seq : -1;
  if (start >= end) return;
  const SlotsOf of(p, at.seq, p.banks[0].E);
  // f(column of p, its slot, column of dh): a lane meets the same columns each time
  const auto for_columns = [&](auto f, auto done) {
    const int down = SHARED ? b * r : columns;
    for (int c = lane; c < down; c += 32) {
      const int slot = SHARED ? c / r * K : c / r;
      for (int j = 0; j < (SHARED ? K : 1); ++j) f((slot + j) * r + c % r, slot + j, c);
      done(c);
    }
  };
  const auto nothing = [](int) {};
  for_columns([&](int c, int, int) { dw_of[warp * columns + c] = dweights_of[warp * columns + c] = 0; }, nothing);
  for (int64_t token = start + warp; token < end; token += kWarps) {
    const auto h = global<const float>(p.h) + token * (SHARED ? b * r : columns);
    const float score = M::kScores ? global<const float>(p.scores)[token] : 0.0f;
    float sum_of_terms = 0;
    for_columns([&](int c, int slot, int of_h) {
      const auto part = global<const float>(p.p_part) + (token * width + slot * RP + c % r);
      float sum = 0;
#pragma unroll 8
      for (int64_t i = 0; i < p.split_k; ++i) sum += part[i * p.T * width];
      sum *= static_cast<float>(p.scaling);
      p_of[warp * columns + c] = sum;
      if constexpr (M::kScores) sum_of_terms += M::score_term(of.bank(slot), of.weight(slot), sum, h[of_h]);
    }, nothing);
    float dscore = 0;
    if constexpr (M::kScores) dscore = M::dscore(score, warp_sum(sum_of_terms));
    float dh = 0;
    for_columns([&](int c, int slot, int of_h) {
      const int bank = of.bank(slot);
      const float q = of.weight(slot), w = M::kScores ? global<const float>(p.w)[of.row(slot) * r + c % r] : 0.0f;
      const float gated = M::gated(bank, score, dscore, p_of[warp * columns + c], w);
      dh += q * gated;
      if constexpr (M::kScores) dw_of[warp * columns + c] += M::dw(bank, q, dscore, h[of_h]);
      dweights_of[warp * columns + c] += gated * h[of_h];
    }, [&](int of_h) {
      global<float>(p.dh)[token * (SHARED ? b * r : columns) + of_h] = dh;
      dh = 0;
    });
  }
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    float sum_dw = 0, sum_dweights = 0;
    for (int w = 0; w < kWarps; ++w) sum_dw += dw_of[w * columns + c], sum_dweights += dweights_of[w * columns + c];
    const int64_t to = static_cast<int64_t>(blockIdx.x) * columns + c;
    if (p.need_dw) global<float>(p.dw_part)[to] = sum_dw;
    if (p.need_slot_weights) global<float>(p.dweights_part)[to] = sum_dweights;
  }
}

// Grid (sum E if dw is needed, n b K if the weights' gradient is): an expert's dw, then a sequence's slot.
__global__ void __launch_bounds__(kSumThreads, 1) reduce_dw_dweights_kernel(GradOutput p, int64_t tiles) {
  const int64_t b = p.b, K = p.K, r = p.r, E0 = p.banks[0].E, E = p.need_dw ? E0 + p.banks[1].E : 0;
  SmemAllocator smem;
  auto scratch = smem.take<float>(kSumThreads);
  const int groups = kSumThreads / static_cast<int>(r);  // a thread has a rank of every groups-th tile
  const int group = threadIdx.x / r, rank = threadIdx.x % r;
  const auto seqs = global<const int>(p.tile_to_seq);
  const bool of_expert = blockIdx.x < E;
  const int64_t item = of_expert ? blockIdx.x : blockIdx.x - E;
  const int64_t bank = item < E0 ? 0 : 1, expert = item - bank * E0;
  const bool in_order = p.ids == nullptr;  // then an expert has one slot
  const int64_t first = bank * K + (in_order ? expert : 0), last = in_order ? first + 1 : first + K;
  float sum = 0;
  for (int64_t t = group; group < groups && t < tiles; t += groups) {
    const int64_t seq = seqs[t];
    if (seq < 0) continue;
    if (of_expert) {
#pragma unroll 1
      for (int64_t slot = first; slot < last; ++slot) {
        if (in_order || global<const int>(p.ids)[seq * b * K + slot] == expert) {
          sum += global<const float>(p.dw_part)[(t * b * K + slot) * r + rank];
        }
      }
    } else if (seq == item / (b * K)) {
      sum += global<const float>(p.dweights_part)[(t * b * K + item % (b * K)) * r + rank];
    }
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < r) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += scratch[g * r + threadIdx.x];
    scratch[threadIdx.x] = total;
    if (of_expert) global<float>(p.dw)[item * r + threadIdx.x] = static_cast<float>(p.scaling) * total;
  }
  __syncthreads();
  if (!of_expert && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < r; ++i) total += scratch[i];
    global<float>(p.dslot_weights)[item] = total;
  }
}

// Grid (outputs, banks, or experts that have an I of their own): dI, a warp an output, the sum of B dw over ranks and
// over the experts that share I; dw has the scaling in it.
__global__ void __launch_bounds__(kThreads, 1) dimportance_kernel(GradOutput p) {
  const int64_t l = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (l >= p.k) return;
  const int64_t E0 = p.banks[0].E, of = blockIdx.y;
  const bool own = p.own_importance, second = own ? of >= E0 : of != 0;
  const int64_t first = own ? of - second * E0 : 0, experts = own ? 1 : second ? p.banks[1].E : E0;
  const auto trained = second ? p.banks[1].trained : p.banks[0].trained;
  const bool learns = !own || trained == nullptr || global<const uint8_t>(trained)[first];
  const Weight B = second ? p.banks[1].B : p.banks[0].B;
  float sum = 0;
  for (int64_t i = lane; learns && i < experts * p.r; i += 32) {
    const int64_t expert = first + i / p.r, rank = i % p.r;
    const float dw = global<const float>(p.dw)[(second * E0 + expert) * p.r + rank];
    sum += weight_at(B, (expert * p.k + l) * p.r + rank) * dw;
  }
  sum = warp_sum(sum);
  if (lane == 0) set_weight(second ? p.banks[1].dimportance : p.banks[0].dimportance, first * p.k + l, sum);
}

void mix_backward(const GradOutput& p) {
  const int64_t tiles = tile_count(p, limits::kMixTile, 1), slots = p.b * p.K;
  const size_t shared = 3 * cdiv(kWarps * slots * p.r * 4, 16) * 16;
  with_mix(p.mix, [&](auto formulas) {
    using M = decltype(formulas);
    const auto kernel = p.shared ? mix_backward_kernel<M, true> : mix_backward_kernel<M, false>;
    launch("mix_backward", kernel, dim3(static_cast<unsigned>(tiles)), kThreads, shared, p.stream, false, p);
  });
  const int64_t sums = (p.need_dw ? p.banks[0].E + p.banks[1].E : 0) + (p.need_slot_weights ? p.n * slots : 0);
  launch("reduce_dw_dweights", reduce_dw_dweights_kernel, dim3(static_cast<unsigned>(sums)), kSumThreads,
         kSumThreads * 4, p.stream, false, p, tiles);
}

}  // namespace

void grad_output(const GradOutput& p) {
  use_device(static_cast<int>(p.device));
  const int64_t RP = rank16(p.r), width = cdiv(p.k, 8) * 8;
  const bool need_B = p.banks[0].dB.data != nullptr || p.banks[1].dB.data != nullptr;
  if (need_B) {
    Mix m(p);
    m.h = p.h;
    m.given = p.scores;
    m.u = p.u;
    mix(m);
  }
  if (p.need_p && p.fused_p_and_dB) pad(p, &Bank::B, p.k, p.r, p.k, RP, false);
  if (p.need_p && !p.fused_p_and_dB) pad(p, &Bank::B, p.k, p.r, RP, width, true);
  WeightView weights;
  for (int bank = 0; bank < p.b; ++bank) weights.bank[bank] = padded_weight(p.banks[bank], p.banks[bank].B);
  if (need_B || (p.need_p && p.fused_p_and_dB)) {
    Outer o(p, Space::kUp);
    o.src = p.g;
    o.u = p.u;
    o.L = p.k;
    o.chunk = p.chunk;
    o.chunks = p.chunks;
    o.need_sums = need_B;
    o.part = p.B_part;
    o.chunk_to_seq = p.chunk_to_seq;
    o.weights = weights;
    o.weights.expert = p.k * RP;
    o.weights.row = RP;
    o.p_part = p.need_p && p.fused_p_and_dB ? p.p_part : nullptr;
    outer("grad_output", o);
  }
  if (p.need_p && !p.fused_p_and_dB) {
    Shrink s(p, Space::kUp);
    s.src = p.g;
    s.L = p.k;
    s.width = width;
    s.weights = weights;
    s.weights.expert = RP * width;
    s.weights.row = width;
    s.split_k = p.split_k;
    s.part = p.p_part;
    shrink(s, p.columns);
  }
  if (p.need_p) mix_backward(p);
  if (need_B) {
    ReduceChunks c(p, Space::kUp);
    c.part = p.B_part;
    c.chunk_to_seq = p.chunk_to_seq;
    c.L = p.k;
    c.chunks = p.chunks;
    c.factor = p.need_dw ? p.dw : nullptr;
    c.own_addend = p.own_importance;
    for (int bank = 0; bank < p.b; ++bank) {
      c.experts[bank] = p.banks[bank].E;
      c.trained[bank] = p.banks[bank].trained;
      c.addend[bank] = p.banks[bank].importance;
      c.out[bank] = p.banks[bank].dB;
    }
    reduce_chunks(c);
  }
  if (p.need_importance) {
    const int64_t vectors = p.own_importance ? p.banks[0].E + p.banks[1].E : p.b;
    const dim3 grid(static_cast<unsigned>(cdiv(p.k, kWarps)), static_cast<unsigned>(vectors));
    launch("dimportance", dimportance_kernel, grid, kThreads, 0, p.stream, false, p);
  }
}
