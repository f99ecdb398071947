// Dropout's masks on a CPU, as a whole array.

#include "dropout.h"

#include "philox.h"

namespace cpu {
namespace {

constexpr int64_t kRows = 64;  // a task's

template <class T, int Bytes>
INLINE void mask_body(const Mask<T>& job, int64_t task) {
  const int64_t first = task * kRows, rows = std::min(kRows, job.rows - first);
  keep_mask(job.mask + first * 16 * job.blocks, first, rows, 0, job.blocks, job.stream, job.seed, job.threshold);
}
FOR_ALL_VECTORS(mask, Mask)

}  // namespace

template <class T>
void fill(const Mask<T>& job) {
  parallel((job.rows + kRows - 1) / kRows, job.threads, [&](int64_t task) { mask(job, task); });
}

template void fill<float>(const Mask<float>&);
template void fill<double>(const Mask<double>&);

}  // namespace cpu
