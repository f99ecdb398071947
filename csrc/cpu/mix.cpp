#include "mix.h"

#include <cmath>

namespace cpu {
namespace {

constexpr int64_t kBlock = 64;  // tokens whose dw is summed before it is added to the rest: shorter chains round less

// A slot of a sequence.
template <class T>
struct Slot {
  int64_t h;  // offset of its h in a token's h
  const T* w;
  T weight;
};

template <class T>
INLINE Slot<T> slot_of(const Mix<T>& job, int64_t seq, int64_t bank, int64_t slot) {
  const int64_t expert = std::max<int64_t>(job.layout.expert(seq, bank, slot), 0) + (bank ? job.layout.experts[0] : 0);
  const int64_t h = (job.shared ? bank : bank * job.layout.slots + slot) * job.layout.rank;
  return {h, job.w + expert * job.layout.rank, job.slot_weights[(seq * 2 + bank) * job.layout.slots + slot]};
}

// Sums in double: the scores of two banks are subtracted.
template <class T>
INLINE double dot(const T* a, const T* b, int64_t size) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(a[i + lane]) * double(b[i + lane]);
  }
  for (; i < size; ++i) lanes[i % 8] += double(a[i]) * double(b[i]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// sigmoid(logit) and sigmoid(-logit), either to full precision
template <class T>
INLINE void shares(T logit, T out[2]) {
  const T small = std::exp(-std::abs(logit)), lower = small / (1 + small), upper = 1 / (1 + small);
  out[0] = logit < 0 ? lower : upper, out[1] = logit < 0 ? upper : lower;
  if (logit != logit) out[0] = out[1] = logit;
}

template <class T>
INLINE int64_t h_columns(const Mix<T>& job) {
  return (job.shared ? 2 : 2 * job.layout.slots) * job.layout.rank;
}

template <class T>
void mix_seq(const Mix<T>& job, int64_t seq) {
  const int64_t slots = job.layout.slots, r = job.layout.rank, h_row = h_columns(job);
  for (int64_t token = job.layout.begin(seq); token < job.layout.end(seq); ++token) {
    const T* h = job.h + token * h_row;
    if (job.make_logits) {
      double score[2] = {};
      for (int64_t i = 0; i < 2 * slots; ++i) {
        const Slot<T> slot = slot_of(job, seq, i / slots, i % slots);
        score[i / slots] += slot.weight * dot(h + slot.h, slot.w, r);
      }
      job.fusion_logits[token] = score[0] - score[1];
    }
    T share[2];
    shares(job.fusion_logits[token], share);
    for (int64_t i = 0; i < 2 * slots; ++i) {
      const Slot<T> slot = slot_of(job, seq, i / slots, i % slots);
      const T factor = job.scaling * share[i / slots] * slot.weight;
      T* u = job.u + token * job.layout.columns() + i * r;
      for (int64_t j = 0; j < r; ++j) u[j] = factor * h[slot.h + j];
    }
  }
}

template <class T>
void mix_backward_seq(const Mix<T>& job, int64_t seq) {
  const int64_t slots = job.layout.slots, r = job.layout.rank, used = job.layout.columns(), h_row = h_columns(job);
  T* dw = job.partial_dw + seq * used;
  T* dq = job.dslot_weights == nullptr ? nullptr : job.dslot_weights + seq * 2 * slots;
  std::vector<T> block(used);  // of dw
  std::vector<double> weights(2 * slots);  // dslot_weights in double: routers' gradients subtract them
  std::fill(dw, dw + used, T(0));
  const int64_t end = job.layout.end(seq);
  for (int64_t first = job.layout.begin(seq); first < end; first += kBlock) {
    std::fill(block.begin(), block.end(), T(0));
    for (int64_t token = first; token < std::min(first + kBlock, end); ++token) {
      const T *h = job.h + token * h_row, *p = job.p + token * used;
      T* dh = job.dh + token * h_row;
      T share[2];
      double along[2] = {};
      shares(job.fusion_logits[token], share);
      for (int64_t i = 0; i < 2 * slots; ++i) {
        const Slot<T> slot = slot_of(job, seq, i / slots, i % slots);
        along[i / slots] += slot.weight * dot(p + i * r, h + slot.h, r);
      }
      const T delta = double(share[0]) * double(share[1]) * (along[0] - along[1]);
      std::fill(dh, dh + h_row, T(0));
      for (int64_t i = 0; i < 2 * slots; ++i) {
        const Slot<T> slot = slot_of(job, seq, i / slots, i % slots);
        const T part = share[i / slots], mine = i < slots ? delta : -delta, along_h = mine * slot.weight;
        T* own = block.data() + i * r;
        for (int64_t j = 0; j < r; ++j) {
          const T gated = part * p[i * r + j] + mine * slot.w[j];
          dh[slot.h + j] += slot.weight * gated;
          own[j] += along_h * h[slot.h + j];
          if (dq != nullptr) weights[i] += double(gated) * double(h[slot.h + j]);
        }
      }
    }
    for (int64_t i = 0; i < used; ++i) dw[i] += block[i];
  }
  for (int64_t i = 0; i < 2 * slots && dq != nullptr; ++i) dq[i] = weights[i];
}

}  // namespace

template <class T>
void mix(const Mix<T>& job) {
  parallel(job.layout.seqs, job.layout.threads, [&](int64_t seq) { mix_seq(job, seq); });
}

template <class T>
void mix_backward(Mix<T> job) {
  const int64_t used = job.layout.columns(), r = job.layout.rank;
  std::vector<T> partial(job.layout.seqs * used);
  job.partial_dw = partial.data();
  parallel(job.layout.seqs, job.layout.threads, [&](int64_t seq) { mix_backward_seq(job, seq); });
  std::fill(job.dw, job.dw + (job.layout.experts[0] + job.layout.experts[1]) * r, T(0));
  for (int64_t i = 0; i < job.layout.seqs * used; ++i) {
    const int64_t slot = i / r, bank = slot / job.layout.slots % 2;
    const int64_t expert = std::max<int32_t>(job.layout.ids[slot], 0) + (bank ? job.layout.experts[0] : 0);
    job.dw[expert * r + i % r] += partial[i];
  }
}

template void mix<float>(const Mix<float>&);
template void mix<double>(const Mix<double>&);
template void mix_backward<float>(Mix<float>);
template void mix_backward<double>(Mix<double>);

}  // namespace cpu
