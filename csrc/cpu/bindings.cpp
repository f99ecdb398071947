// The optional module smolora._cpu: passes that are compiled for a CPU. A tensor comes as an address, 0 for none.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "common.h"
#include "decode.h"
#include "dropout.h"
#include "mix.h"
#include "products.h"

namespace py = pybind11;
using namespace py::literals;

namespace cpu {

int widest() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) return 64;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
  return 16;
}

int width = widest();

}  // namespace cpu

namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;  // one a bank

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T, class Pointer>
void set(Pointer* pointers, const Addresses& addresses) {
  for (size_t bank = 0; bank < addresses.size(); ++bank) pointers[bank] = at<T>(addresses[bank]);
}

template <class T>
int decode(Address x, Address y, Address ids, Address slot_weights, const std::vector<std::array<Address, 5>>& banks,
           Address scores, const std::array<int64_t, 5>& sizes, bool shared, double scaling, int threads) {
  cpu::Decode<T> job{};
  job.x = at<T>(x);
  job.y = at<T>(y);
  job.ids = at<int32_t>(ids);
  job.slot_weights = at<T>(slot_weights);
  job.banks = banks.size();
  for (size_t bank = 0; bank < banks.size(); ++bank) {
    job.A[bank] = at<T>(banks[bank][0]);
    job.B[bank] = at<T>(banks[bank][1]);
    job.importance[bank] = at<T>(banks[bank][2]);
    job.own_importance[bank] = banks[bank][3];
    job.experts[bank] = banks[bank][4];
  }
  job.scores = at<T>(scores);
  job.n = sizes[0];
  job.d = sizes[1];
  job.k = sizes[2];
  job.r = sizes[3];
  job.slots = sizes[4];
  job.shared = shared;
  job.scaling = scaling;
  job.threads = threads;
  return cpu::decode(job);
}

cpu::Layout layout(int64_t tokens, int64_t seqs, int64_t slots, int64_t rank, const std::vector<int64_t>& experts,
                   Address cu_seqlens, Address ids, int threads) {
  cpu::Layout layout{};
  layout.tokens = tokens;
  layout.seqs = seqs;
  layout.banks = experts.size();
  layout.slots = slots;
  layout.rank = rank;
  std::copy(experts.begin(), experts.end(), layout.experts);
  layout.cu_seqlens = at<int32_t>(cu_seqlens);
  layout.ids = at<int32_t>(ids);
  layout.threads = threads;
  return layout;
}

template <class T>
cpu::Down<T> down(const cpu::Layout& layout, const Addresses& A, int64_t d, int threshold, uint64_t seed,
                  const std::vector<uint32_t>& streams) {
  cpu::Down<T> job{};
  job.layout = layout;
  set<T>(job.A, A);
  job.d = d;
  job.threshold = threshold;
  job.seed = seed;
  std::copy_n(streams.begin(), layout.banks, job.streams);
  return job;
}

template <class T>
void shrink(const cpu::Layout& layout, const Addresses& A, int64_t d, int threshold, uint64_t seed,
            const std::vector<uint32_t>& streams, Address x, Address h) {
  cpu::Down<T> job = down<T>(layout, A, d, threshold, seed, streams);
  job.x = at<T>(x);
  job.h = at<T>(h);
  cpu::shrink(job);
}

template <class T>
void grad_down(const cpu::Layout& layout, const Addresses& A, int64_t d, int threshold, uint64_t seed,
               const std::vector<uint32_t>& streams, Address x, Address dh, Address dx, const Addresses& trained,
               const Addresses& dA) {
  cpu::Down<T> job = down<T>(layout, A, d, threshold, seed, streams);
  job.x = at<T>(x);
  job.dh = at<T>(dh);
  job.dx = at<T>(dx);
  set<bool>(job.trained, trained);
  set<T>(job.dA, dA);
  cpu::grad_down(job);
}

template <class T>
void expand(const cpu::Layout& layout, const Addresses& B, int64_t k, Address u, Address bias, Address y) {
  cpu::Up<T> job{};
  job.layout = layout;
  set<T>(job.B, B);
  job.k = k;
  job.u = at<T>(u);
  job.bias = at<T>(bias);
  job.y = at<T>(y);
  cpu::expand(job);
}

template <class T>
void grad_up(const cpu::Layout& layout, const Addresses& B, const Addresses& trained, int64_t k, double scaling,
             Address g, Address u, Address p, const Addresses& dB) {
  cpu::Up<T> job{};
  job.layout = layout;
  set<T>(job.B, B);
  set<bool>(job.trained, trained);
  job.k = k;
  job.scaling = scaling;
  job.g = at<T>(g);
  job.u = at<T>(u);
  job.p = at<T>(p);
  set<T>(job.dB, dB);
  cpu::grad_up(job);
}

template <class T>
cpu::Mix<T> smolora_mix(const cpu::Layout& layout, bool shared, Address h, Address w, Address slot_weights,
                        Address fusion_logits) {
  cpu::Mix<T> job{};
  job.layout = layout;
  job.shared = shared;
  job.h = at<T>(h);
  job.w = at<T>(w);
  job.slot_weights = at<T>(slot_weights);
  job.fusion_logits = at<T>(fusion_logits);
  return job;
}

template <class T>
void mix(const cpu::Layout& layout, bool shared, Address h, Address w, Address slot_weights, Address fusion_logits,
         bool make_logits, double scaling, Address u) {
  cpu::Mix<T> job = smolora_mix<T>(layout, shared, h, w, slot_weights, fusion_logits);
  job.make_logits = make_logits;
  job.scaling = scaling;
  job.u = at<T>(u);
  cpu::mix(job);
}

template <class T>
void mix_backward(const cpu::Layout& layout, bool shared, Address h, Address w, Address slot_weights,
                  Address fusion_logits, Address p, Address dh, Address dw, Address dslot_weights) {
  cpu::Mix<T> job = smolora_mix<T>(layout, shared, h, w, slot_weights, fusion_logits);
  job.p = at<T>(p);
  job.dh = at<T>(dh);
  job.dw = at<T>(dw);
  job.dslot_weights = at<T>(dslot_weights);
  cpu::mix_backward(job);
}

template <class T>
cpu::Scores<T> bank_scores(const std::array<int64_t, 3>& shape, double scaling, Address B, Address importance,
                           int threads) {
  cpu::Scores<T> job{};
  job.experts = shape[0];
  job.k = shape[1];
  job.rank = shape[2];
  job.scaling = scaling;
  job.B = at<T>(B);
  job.importance = at<T>(importance);
  job.threads = threads;
  return job;
}

template <class T>
void scores(const std::array<int64_t, 3>& shape, double scaling, Address B, Address importance, Address w,
            int threads) {
  cpu::Scores<T> job = bank_scores<T>(shape, scaling, B, importance, threads);
  job.w = at<T>(w);
  cpu::scores(job);
}

template <class T>
void grad_scores(const std::array<int64_t, 3>& shape, double scaling, Address B, Address importance, Address dw,
                 Address trained, Address dB, Address dimportance, int threads) {
  cpu::Scores<T> job = bank_scores<T>(shape, scaling, B, importance, threads);
  job.dw = at<T>(dw);
  job.trained = at<bool>(trained);
  job.dB = at<T>(dB);
  job.dimportance = at<T>(dimportance);
  cpu::grad_scores(job);
}

template <class T>
void keep_mask(Address mask, int64_t rows, int64_t blocks, uint32_t stream, uint64_t seed, int threshold, int threads) {
  cpu::fill(cpu::Mask<T>{at<T>(mask), rows, blocks, stream, seed, threshold, threads});
}

template <class T>
void define(py::module_& m, const std::string& type) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  const auto add = [&](const char* name, auto function, auto... arguments) {
    m.def((std::string(name) + "_" + type).c_str(), function, arguments..., unlocked);
  };
  const py::kw_only named;
  add("decode", &decode<T>);
  add("keep_mask", &keep_mask<T>);
  add("shrink", &shrink<T>, "layout"_a, named, "A"_a, "d"_a, "threshold"_a, "seed"_a, "streams"_a, "x"_a, "h"_a);
  add("grad_down", &grad_down<T>, "layout"_a, named, "A"_a, "d"_a, "threshold"_a, "seed"_a, "streams"_a, "x"_a, "dh"_a,
      "dx"_a, "trained"_a, "dA"_a);
  add("expand", &expand<T>, "layout"_a, named, "B"_a, "k"_a, "u"_a, "bias"_a, "y"_a);
  add("grad_up", &grad_up<T>, "layout"_a, named, "B"_a, "trained"_a, "k"_a, "scaling"_a, "g"_a, "u"_a, "p"_a, "dB"_a);
  add("mix", &mix<T>, "layout"_a, named, "shared"_a, "h"_a, "w"_a, "slot_weights"_a, "fusion_logits"_a,
      "make_logits"_a, "scaling"_a, "u"_a);
  add("mix_backward", &mix_backward<T>, "layout"_a, named, "shared"_a, "h"_a, "w"_a, "slot_weights"_a,
      "fusion_logits"_a, "p"_a, "dh"_a, "dw"_a, "dslot_weights"_a);
  add("scores", &scores<T>, named, "shape"_a, "scaling"_a, "B"_a, "importance"_a, "w"_a, "threads"_a);
  add("grad_scores", &grad_scores<T>, named, "shape"_a, "scaling"_a, "B"_a, "importance"_a, "dw"_a, "trained"_a,
      "dB"_a, "dimportance"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  py::class_<cpu::Layout>(m, "Layout")
      .def(py::init(&layout), py::kw_only(), "tokens"_a, "seqs"_a, "slots"_a, "rank"_a, "experts"_a, "cu_seqlens"_a,
           "ids"_a, "threads"_a)
      .def_readonly("slots", &cpu::Layout::slots);
  define<float>(m, "float");
  define<double>(m, "double");
  m.def("widest", &cpu::widest, "Bytes of this CPU's widest vectors that there is code for: 64, 32 or 16.");
  m.def(
      "use_width", [](int bytes) { cpu::width = std::min(bytes, cpu::widest()); },
      "Run with vectors of this many bytes, or this CPU's widest if that is less.");
}
