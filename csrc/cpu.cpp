// The optional module smolora._cpu: passes that are compiled for a CPU. Tensors come as addresses and sizes.

#include "cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cpu_decode.h"
#include "cpu_dropout.h"
#include "cpu_fusion.h"
#include "cpu_products.h"

namespace py = pybind11;

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

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
int decode(Address x, Address y, Address ids, Address slot_weights, const std::vector<std::array<Address, 4>>& banks,
           Address scores, const std::array<int64_t, 5>& sizes, bool shared, double scaling, int threads) {
  cpu::Decode<T> job{};
  job.x = at<T>(x), job.y = at<T>(y), job.ids = at<int32_t>(ids), job.slot_weights = at<T>(slot_weights);
  job.banks = banks.size();
  for (size_t bank = 0; bank < banks.size(); ++bank) {
    job.A[bank] = at<T>(banks[bank][0]), job.B[bank] = at<T>(banks[bank][1]);
    job.importance[bank] = at<T>(banks[bank][2]), job.experts[bank] = banks[bank][3];
  }
  job.scores = at<T>(scores);
  job.n = sizes[0], job.d = sizes[1], job.k = sizes[2], job.r = sizes[3], job.slots = sizes[4];
  job.shared = shared, job.scaling = scaling, job.threads = threads;
  py::gil_scoped_release release;
  return cpu::decode(job);
}

template <class T>
void keep_mask(Address mask, int64_t rows, int64_t blocks, uint32_t stream, uint64_t seed, int threshold, int threads) {
  cpu::fill(cpu::Mask<T>{at<T>(mask), rows, blocks, stream, seed, threshold, threads});
}

using Banks = std::vector<std::array<Address, 4>>;  // parameter, its experts, its gradient, which of them train

// (T, n, K, r, threads); boundaries and ids, or 0
cpu::Layout layout(const std::array<int64_t, 5>& sizes, Address cu, Address ids, const Banks& banks) {
  cpu::Layout out{};
  out.tokens = sizes[0], out.seqs = sizes[1], out.slots = sizes[2], out.rank = sizes[3], out.threads = int(sizes[4]);
  out.banks = banks.size(), out.cu = at<int32_t>(cu), out.ids = at<int32_t>(ids);
  return out;
}

template <class T>
cpu::Down<T> down(const std::array<int64_t, 5>& sizes, Address cu, Address ids, const Banks& banks, int threshold,
                  uint64_t seed, const std::vector<uint32_t>& streams, int64_t d) {
  cpu::Down<T> job{};
  job.at = layout(sizes, cu, ids, banks), job.threshold = threshold, job.seed = seed, job.d = d;
  for (size_t bank = 0; bank < banks.size(); ++bank) {
    job.A[bank] = at<T>(banks[bank][0]), job.experts[bank] = banks[bank][1], job.dA[bank] = at<T>(banks[bank][2]);
    job.streams[bank] = streams[bank];
  }
  return job;
}

template <class T>
cpu::Up<T> up(const std::array<int64_t, 5>& sizes, Address cu, Address ids, const Banks& banks, int64_t k) {
  cpu::Up<T> job{};
  job.at = layout(sizes, cu, ids, banks), job.k = k;
  for (size_t bank = 0; bank < banks.size(); ++bank) {
    job.B[bank] = at<T>(banks[bank][0]), job.experts[bank] = banks[bank][1], job.dB[bank] = at<T>(banks[bank][2]);
    job.trained[bank] = at<bool>(banks[bank][3]);
  }
  return job;
}

template <class T>
cpu::Fusion<T> fusion(const std::array<int64_t, 5>& sizes, Address cu, Address ids,
                      const std::array<int64_t, 2>& experts, bool shared, double scaling, Address h, Address w,
                      Address slot_weights, Address logits) {
  cpu::Fusion<T> job{};
  job.at = layout(sizes, cu, ids, Banks(2));
  job.shared = shared, job.scaling = scaling, job.experts[0] = experts[0], job.experts[1] = experts[1];
  job.h = at<T>(h), job.w = at<T>(w), job.slot_weights = at<T>(slot_weights), job.logits = at<T>(logits);
  return job;
}

template <class T>
void define(py::module_& m, const std::string& type) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  using Sizes = std::array<int64_t, 5>;
  m.def(("keep_mask_" + type).c_str(), &keep_mask<T>, unlocked);
  m.def(("decode_" + type).c_str(), &decode<T>);
  m.def(
      ("shrink_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Banks& banks, int threshold, uint64_t seed,
         const std::vector<uint32_t>& streams, int64_t d, Address x, Address h) {
        cpu::Down<T> job = down<T>(sizes, cu, ids, banks, threshold, seed, streams, d);
        job.x = at<T>(x), job.h = at<T>(h);
        cpu::shrink(job);
      },
      unlocked);
  m.def(
      ("grad_down_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Banks& banks, int threshold, uint64_t seed,
         const std::vector<uint32_t>& streams, int64_t d, Address x, Address dh, Address dx) {
        cpu::Down<T> job = down<T>(sizes, cu, ids, banks, threshold, seed, streams, d);
        job.x = at<T>(x), job.dh = at<T>(dh), job.dx = at<T>(dx);
        cpu::grad_down(job);
      },
      unlocked);
  m.def(
      ("expand_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Banks& banks, int64_t k, Address u, Address bias,
         Address y) {
        cpu::Up<T> job = up<T>(sizes, cu, ids, banks, k);
        job.u = at<T>(u), job.bias = at<T>(bias), job.y = at<T>(y);
        cpu::expand(job);
      },
      unlocked);
  m.def(
      ("grad_up_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Banks& banks, int64_t k, double scaling, Address g,
         Address u, Address p) {
        cpu::Up<T> job = up<T>(sizes, cu, ids, banks, k);
        job.scaling = scaling, job.g = at<T>(g), job.u = at<T>(u), job.p = at<T>(p);
        cpu::grad_up(job);
      },
      unlocked);
  using Two = std::array<int64_t, 2>;
  m.def(
      ("fuse_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Two& experts, bool shared, double scaling, Address h,
         Address w, Address slot_weights, Address logits, Address u, bool fresh) {
        cpu::Fusion<T> job = fusion<T>(sizes, cu, ids, experts, shared, scaling, h, w, slot_weights, logits);
        job.u = at<T>(u);
        cpu::fuse(job, fresh);
      },
      unlocked);
  m.def(
      ("grad_fuse_" + type).c_str(),
      [](const Sizes& sizes, Address cu, Address ids, const Two& experts, bool shared, double scaling, Address h,
         Address w, Address slot_weights, Address logits, Address p, Address dh, Address dw, Address dslot_weights) {
        cpu::Fusion<T> job = fusion<T>(sizes, cu, ids, experts, shared, scaling, h, w, slot_weights, logits);
        job.p = at<T>(p), job.dh = at<T>(dh), job.dw = at<T>(dw), job.dslot_weights = at<T>(dslot_weights);
        cpu::grad_fuse(job);
      },
      unlocked);
  const auto scores = [](const std::array<int64_t, 4>& sizes, double scaling, Address B, Address importance) {
    cpu::Scores<T> job{};
    job.experts = sizes[0], job.k = sizes[1], job.rank = sizes[2], job.threads = int(sizes[3]), job.scaling = scaling;
    job.B = at<T>(B), job.importance = at<T>(importance);
    return job;
  };
  m.def(
      ("scores_" + type).c_str(),
      [scores](const std::array<int64_t, 4>& sizes, double scaling, Address B, Address importance, Address w) {
        cpu::Scores<T> job = scores(sizes, scaling, B, importance);
        job.w = at<T>(w);
        cpu::scores(job);
      },
      unlocked);
  m.def(
      ("grad_scores_" + type).c_str(),
      [scores](const std::array<int64_t, 4>& sizes, double scaling, Address B, Address importance, Address c,
               Address dB, Address dI) {
        cpu::Scores<T> job = scores(sizes, scaling, B, importance);
        job.c = at<T>(c), job.dB = at<T>(dB), job.dI = at<T>(dI);
        cpu::grad_scores(job);
      },
      unlocked);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  define<float>(m, "float");
  define<double>(m, "double");
  m.def("widest", &cpu::widest, "Bytes of this CPU's widest vectors that there is code for: 64, 32 or 16.");
  m.def(
      "use_width", [](int bytes) { cpu::width = std::min(bytes, cpu::widest()); },
      "Run with vectors of this many bytes, or this CPU's widest if that is less.");
}
