// The optional module smolora._cpu: passes that are compiled for a CPU. Tensors come as addresses and sizes.

#include "cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu_decode.h"

namespace py = pybind11;

namespace cpu {

void keep_mask(float* mask, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold);
void keep_mask(double* mask, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold);

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def(
      "keep_mask",
      [](Address mask, bool is_double, int64_t count, int64_t blocks, uint32_t stream, uint64_t seed, int threshold) {
        if (is_double) {
          cpu::keep_mask(at<double>(mask), count, blocks, stream, seed, threshold);
        } else {
          cpu::keep_mask(at<float>(mask), count, blocks, stream, seed, threshold);
        }
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("decode_float", &decode<float>);
  m.def("decode_double", &decode<double>);
  m.def("widest", &cpu::widest, "Bytes of this CPU's widest vectors that there is code for: 64, 32 or 16.");
  m.def(
      "use_width", [](int bytes) { cpu::width = std::min(bytes, cpu::widest()); },
      "Run with vectors of this many bytes, or this CPU's widest if that is less.");
}
