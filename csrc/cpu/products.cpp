#include "products.h"

#include "philox.h"
#include "tile.h"

#include <memory>

namespace cpu {
namespace {

constexpr int64_t kTokens = 64;    // a block of tokens
constexpr int64_t kFew = 24;       // tokens whose columns of y a task writes before the next ones
constexpr int64_t kColumns = 128;  // a block of columns of x or g; kTokens rows of it fit into L2
constexpr int64_t kPitch = kColumns + 16;  // of a block's rows: powers of two compete for the same cache sets
constexpr int64_t kStrip = 512;    // columns of y that a task writes
constexpr int64_t kGroups = 8;     // split-k of p: groups of columns of g, each with a partial p

int64_t chunks(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// Thread-local scratch of `size` elements, 64-byte aligned, reused between calls.
template <class T, int Place>
T* scratch(int64_t size) {
  thread_local std::vector<T> kept;
  if (int64_t(kept.size()) < size + 16) kept.resize(size + 16);
  const uintptr_t address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// Copies a block (rows, count) of a wide array, zero-padded to kColumns.
template <class T, int Bytes>
INLINE void copy_block(const T* from, int64_t from_row, int64_t rows, int64_t count, T* to) {
  constexpr int kSize = Vector<T, Bytes>::kSize;
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += kPitch) {
    if (count == kColumns) {
      for (int64_t i = 0; i < kColumns; i += kSize) store<T, Bytes>(to + i, load<T, Bytes>(from + i));
    } else {
      std::copy_n(from, count, to);
      std::fill(to + count, to + kColumns, T(0));
    }
  }
}

// -------------------------------------------------------------------------------------------- between x and rank space

template <class T, int Bytes>
INLINE void shrink_task_body(const Down<T>& job, int64_t task) {
  const Layout& at = job.layout;
  const int64_t first = task * kTokens, last = std::min(first + kTokens, at.tokens);
  const int64_t blocks = chunks(job.d, 16), width = job.threshold ? 16 * blocks : job.d;
  const T scale = T(256) / T(256 - job.threshold);
  int64_t seq = 0;
  for (int64_t token = first; token < last;) {
    while (at.ids != nullptr && at.end(seq) <= token) ++seq;
    // as many tokens as a tile has rows: their rows of x fit into L1 together
    const int64_t end = std::min({token + kTileRows<Bytes>, last, at.ids == nullptr ? last : at.end(seq)});
    const int64_t rows = end - token;
    for (int64_t bank = 0; bank < at.banks; ++bank) {
      const T* x = job.x + token * job.d;
      if (job.threshold) {
        T* kept = scratch<T, 0>(kTileRows<Bytes> * width);
        keep_mask(kept, token, rows, 0, blocks, job.streams[bank], job.seed, job.threshold);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t i = 0; i < job.d; ++i) kept[row * width + i] *= x[row * job.d + i];
        }
        x = kept;
      }
      for (int64_t slot = 0; slot < at.slots; ++slot) {
        T* h = job.h + token * at.columns() + (bank * at.slots + slot) * at.rank;
        // an empty slot (-1) reads expert 0: its weight is 0
        const T* A = job.A[bank] + std::max<int64_t>(at.expert(seq, bank, slot), 0) * at.rank * job.d;
        dot_rows<T, Bytes, kTileRows<Bytes>>(rows, at.rank, job.d, x, width, A, job.d, scale, h, at.columns());
      }
    }
    token = end;
  }
}
FOR_ALL_VECTORS(shrink_task, Down)  // defines shrink_task(job, task), which picks the vector width

// dx and dA of kColumns columns. dA is summed over tokens in order, sequence by sequence.
template <class T, int Bytes>
INLINE void grad_down_task_body(const Down<T>& job, int64_t task) {
  constexpr int64_t kTile = kWidth<T, Bytes>;
  const Layout& at = job.layout;
  const int64_t first = task * kColumns, count = std::min(kColumns, job.d - first);
  const int64_t used = at.columns(), per_bank = at.slots * at.rank;
  const int64_t seqs = at.ids == nullptr ? 1 : at.seqs;
  T* A = scratch<T, 1>(used * kPitch);          // (b K r, columns)
  T* sums = scratch<T, 2>(used * kColumns);     // dA of a sequence
  T* mask = scratch<T, 3>(kTokens * kColumns);  // dropout mask of a bank
  T* kept = scratch<T, 4>(kTokens * kPitch);    // x after dropout
  T* part = scratch<T, 5>(kTokens * kColumns);  // dx of a bank
  bool need_A = false;
  for (int64_t bank = 0; bank < at.banks; ++bank) {
    need_A |= job.dA[bank] != nullptr;
    if (job.dA[bank] == nullptr) continue;
    for (int64_t row = 0; row < at.experts[bank] * at.rank; ++row) {
      std::fill_n(job.dA[bank] + row * job.d + first, count, T(0));
    }
  }
  for (int64_t seq = 0; seq < seqs; ++seq) {
    const int64_t begin = at.ids == nullptr ? 0 : at.begin(seq), end = at.ids == nullptr ? at.tokens : at.end(seq);
    if (begin == end) continue;
    bool live = false;  // an A of this sequence learns
    for (int64_t slot = 0; slot < at.banks * at.slots && need_A; ++slot) {
      const int64_t bank = slot / at.slots, expert = at.expert(seq, bank, slot % at.slots);
      live |= job.dA[bank] != nullptr && expert >= 0 && (job.trained[bank] == nullptr || job.trained[bank][expert]);
    }
    for (int64_t row = 0; row < used && job.dx != nullptr; ++row) {
      const int64_t slot = row / at.rank, bank = slot / at.slots;
      const int64_t expert = std::max<int64_t>(at.expert(seq, bank, slot % at.slots), 0);
      const T* from = job.A[bank] + (expert * at.rank + row % at.rank) * job.d + first;
      std::copy(from, from + count, A + row * kPitch);
      std::fill(A + row * kPitch + count, A + row * kPitch + kColumns, T(0));
    }
    if (live) std::fill(sums, sums + used * kColumns, T(0));
    for (int64_t token = begin; token < end; token += kTokens) {
      const int64_t rows = std::min(kTokens, end - token);
      const T* dh = job.dh + token * used;
      for (int64_t bank = 0; bank < at.banks; ++bank) {
        const T* dh_bank = dh + bank * per_bank;
        if (job.threshold) {
          keep_mask(mask, token, rows, first / 16, chunks(count, 16), job.streams[bank], job.seed, job.threshold);
        }
        const int64_t mask_row = 16 * chunks(count, 16);
        if (job.dx != nullptr) {
          T* dx = job.dx + token * job.d + first;
          const bool direct = !job.threshold && count == kColumns;
          multiply<T, Bytes>(rows, padded(count, kTile), per_bank, dh_bank, used, 1, A + bank * per_bank * kPitch,
                             kPitch, direct ? dx : part, direct ? job.d : kColumns, direct && bank > 0);
          for (int64_t row = 0; row < rows && !direct; ++row) {
            T* to = dx + row * job.d;
            T* from = part + row * kColumns;
            if (job.threshold) {
              for (int64_t i = 0; i < count; ++i) from[i] *= mask[row * mask_row + i];
            }
            if (bank == 0) {
              std::copy(from, from + count, to);
            } else {
              for (int64_t i = 0; i < count; ++i) to[i] += from[i];
            }
          }
        }
        if (job.dA[bank] == nullptr || !live) continue;
        const T* x = job.x + token * job.d + first;
        if (job.threshold || bank == 0 || job.dA[0] == nullptr) {
          copy_block<T, Bytes>(x, job.d, rows, count, kept);
        }
        for (int64_t row = 0; row < rows && job.threshold; ++row) {
          for (int64_t i = 0; i < count; ++i) kept[row * kPitch + i] *= mask[row * mask_row + i];
        }
        multiply<T, Bytes>(per_bank, padded(count, kTile), rows, dh_bank, 1, used, kept, kPitch,
                           sums + bank * per_bank * kColumns, kColumns, true);
      }
    }
    for (int64_t row = 0; row < used && live; ++row) {
      const int64_t slot = row / at.rank, bank = slot / at.slots, expert = at.expert(seq, bank, slot % at.slots);
      if (expert < 0 || job.dA[bank] == nullptr) continue;
      if (job.trained[bank] != nullptr && !job.trained[bank][expert]) continue;
      T* to = job.dA[bank] + (expert * at.rank + row % at.rank) * job.d + first;
      for (int64_t i = 0; i < count; ++i) to[i] += sums[row * kColumns + i];
    }
  }
}
FOR_ALL_VECTORS(grad_down_task, Down)

// -------------------------------------------------------------------------------------------- between rank space and y

// Writes kStrip columns of y.
template <class T, int Bytes>
INLINE void expand_task_body(const Up<T>& job, int64_t task) {
  constexpr int64_t kTile = kWidth<T, Bytes>;
  const Layout& at = job.layout;
  const int64_t first = task * kStrip, count = std::min(kStrip, job.k - first);
  const int64_t used = at.columns(), seqs = at.ids == nullptr ? 1 : at.seqs;
  T* B = scratch<T, 1>(used * kStrip);  // (tiles, b K r, columns of a tile)
  T* part = scratch<T, 5>(kFew * kTile);
  if (count < kStrip) std::fill(B, B + used * kStrip, T(0));
  for (int64_t seq = 0; seq < seqs; ++seq) {
    const int64_t begin = at.ids == nullptr ? 0 : at.begin(seq), end = at.ids == nullptr ? at.tokens : at.end(seq);
    if (begin == end) continue;
    for (int64_t slot = 0; slot < at.banks * at.slots; ++slot) {
      const int64_t bank = slot / at.slots, expert = std::max<int64_t>(at.expert(seq, bank, slot % at.slots), 0);
      const T* from = job.B[bank] + (expert * job.k + first) * at.rank;
      for (int64_t i = 0; i < count; ++i) {
        T* to = B + (i / kTile * used + slot * at.rank) * kTile + i % kTile;
        for (int64_t j = 0; j < at.rank; ++j) to[j * kTile] = from[i * at.rank + j];
      }
    }
    for (int64_t token = begin; token < end; token += kFew) {
      const int64_t rows = std::min(kFew, end - token);
      for (int64_t c = 0; c < count; c += kTile) {
        T* y = job.y + token * job.k + first + c;
        const int64_t inside = std::min(kTile, count - c);
        const bool direct = inside == kTile;
        T* out = direct ? y : part;
        const int64_t out_row = direct ? job.k : kTile;
        for (int64_t row = 0; row < rows && job.bias != nullptr; ++row) {
          std::copy_n(job.bias + first + c, inside, out + row * out_row);
        }
        multiply<T, Bytes>(rows, kTile, used, job.u + token * used, used, 1, B + c * used, kTile, out, out_row,
                           job.bias != nullptr);
        for (int64_t row = 0; row < rows && !direct; ++row) std::copy_n(part + row * kTile, inside, y + row * job.k);
      }
    }
  }
}
FOR_ALL_VECTORS(expand_task, Up)

// Partial p and dB of a group of columns, from one read of g. dB is summed over tokens in order, sequence by sequence.
template <class T, int Bytes>
INLINE void grad_up_task_body(const Up<T>& job, int64_t task) {
  constexpr int64_t kTile = kWidth<T, Bytes>;
  const Layout& at = job.layout;
  const int64_t used = at.columns(), stride = padded(used, kTile), seqs = at.ids == nullptr ? 1 : at.seqs;
  const int64_t pieces = chunks(job.k, kColumns);
  T* B = scratch<T, 1>(kColumns * stride);
  T* sums = scratch<T, 2>(kColumns * stride);  // dB of a sequence
  T* u = scratch<T, 3>(kTokens * stride);
  T* p = scratch<T, 4>(kTokens * stride);
  T* g = scratch<T, 5>(kTokens * kPitch);
  std::fill(u, u + kTokens * stride, T(0));
  bool written = false;
  for (int64_t piece = pieces * task / kGroups; piece < pieces * (task + 1) / kGroups; ++piece) {
    const int64_t first = piece * kColumns, count = std::min(kColumns, job.k - first);
    bool need_B = false;
    for (int64_t bank = 0; bank < at.banks; ++bank) {
      if (job.dB[bank] == nullptr) continue;
      need_B = true;
      for (int64_t expert = 0; expert < at.experts[bank]; ++expert) {
        std::fill_n(job.dB[bank] + (expert * job.k + first) * at.rank, count * at.rank, T(0));
      }
    }
    for (int64_t seq = 0; seq < seqs; ++seq) {
      const int64_t begin = at.ids == nullptr ? 0 : at.begin(seq), end = at.ids == nullptr ? at.tokens : at.end(seq);
      if (begin == end) continue;
      bool live = false;  // an expert of this sequence trains
      for (int64_t slot = 0; slot < at.banks * at.slots; ++slot) {
        const int64_t bank = slot / at.slots, expert = at.expert(seq, bank, slot % at.slots);
        live |= job.dB[bank] != nullptr && expert >= 0 && (job.trained[bank] == nullptr || job.trained[bank][expert]);
        if (job.p == nullptr) continue;
        const T* from = job.B[bank] + (std::max<int64_t>(expert, 0) * job.k + first) * at.rank;
        for (int64_t c = 0; c < count; ++c) {
          std::copy_n(from + c * at.rank, at.rank, B + c * stride + slot * at.rank);
        }
      }
      for (int64_t c = 0; c < count && job.p != nullptr; ++c) {
        std::fill(B + c * stride + used, B + (c + 1) * stride, T(0));
      }
      if (need_B && live) std::fill(sums, sums + count * stride, T(0));
      for (int64_t token = begin; token < end; token += kTokens) {
        const int64_t rows = std::min(kTokens, end - token);
        copy_block<T, Bytes>(job.g + token * job.k + first, job.k, rows, count, g);
        if (job.p != nullptr) {
          T* mine = job.partial_p + (task * at.tokens + token) * used;
          const bool direct = used == stride;
          T* out = direct ? mine : p;
          multiply<T, Bytes>(rows, stride, count, g, kPitch, 1, B, stride, out, stride, direct && written);
          for (int64_t i = 0; i < rows * used && !direct; ++i) {
            const T value = p[i / used * stride + i % used];
            mine[i] = written ? mine[i] + value : value;
          }
        }
        if (need_B && live) {
          const T* right = job.u + token * used;
          if (used != stride) {
            for (int64_t row = 0; row < rows; ++row) std::copy_n(right + row * used, used, u + row * stride);
            right = u;
          }
          multiply<T, Bytes>(count, stride, rows, g, 1, kPitch, right, stride, sums, stride, true);
        }
      }
      for (int64_t slot = 0; slot < at.banks * at.slots && need_B && live; ++slot) {
        const int64_t bank = slot / at.slots, expert = at.expert(seq, bank, slot % at.slots);
        if (job.dB[bank] == nullptr || expert < 0) continue;
        if (job.trained[bank] != nullptr && !job.trained[bank][expert]) continue;
        T* to = job.dB[bank] + (expert * job.k + first) * at.rank;
        for (int64_t c = 0; c < count; ++c) {
          const T* from = sums + c * stride + slot * at.rank;
          for (int64_t j = 0; j < at.rank; ++j) to[c * at.rank + j] += from[j];
        }
      }
    }
    written = true;
  }
}
FOR_ALL_VECTORS(grad_up_task, Up)

template <class T, int Bytes>
INLINE void add_partial_p_body(const Up<T>& job, int64_t task) {
  const int64_t used = job.layout.columns();
  const int64_t first = task * kTokens, last = std::min(first + kTokens, job.layout.tokens);
  const int64_t pieces = chunks(job.k, kColumns);
  for (int64_t i = first * used; i < last * used; ++i) {
    T total = 0;
    for (int64_t group = 0; group < kGroups; ++group) {
      if (pieces * group / kGroups == pieces * (group + 1) / kGroups) continue;  // a group without columns
      total += job.partial_p[group * job.layout.tokens * used + i];
    }
    job.p[i] = job.scaling * total;
  }
}
FOR_ALL_VECTORS(add_partial_p, Up)

// -------------------------------------------------------------------------------------------------------- the scores

template <class T, int Bytes>
INLINE void scores_task_body(const Scores<T>& job, int64_t expert) {
  T* w = job.w + expert * job.rank;
  std::fill(w, w + job.rank, T(0));
  for (int64_t first = 0; first < job.k; first += kColumns) {
    T* part = scratch<T, 6>(job.rank);
    std::fill(part, part + job.rank, T(0));
    for (int64_t c = first; c < std::min(first + kColumns, job.k); ++c) {
      const T* B = job.B + (expert * job.k + c) * job.rank;
      for (int64_t j = 0; j < job.rank; ++j) part[j] += B[j] * job.importance[c];
    }
    for (int64_t j = 0; j < job.rank; ++j) w[j] += part[j];
  }
  for (int64_t j = 0; j < job.rank; ++j) w[j] *= job.scaling;
}
FOR_ALL_VECTORS(scores_task, Scores)

template <class T, int Bytes>
INLINE void grad_scores_task_body(const Scores<T>& job, int64_t task) {
  const int64_t first = task * kColumns, last = std::min(first + kColumns, job.k);
  if (job.dimportance != nullptr) std::fill(job.dimportance + first, job.dimportance + last, T(0));
  for (int64_t expert = 0; expert < job.experts; ++expert) {
    const T* dw = job.dw + expert * job.rank;
    if (std::all_of(dw, dw + job.rank, [](T value) { return value == 0; })) continue;  // no sequence chose it
    const bool learns = job.dB != nullptr && (job.trained == nullptr || job.trained[expert]);
    for (int64_t i = first; i < last; ++i) {
      const T* B = job.B + (expert * job.k + i) * job.rank;
      if (job.dimportance != nullptr) {
        T total = 0;
        for (int64_t j = 0; j < job.rank; ++j) total += B[j] * dw[j];
        job.dimportance[i] += job.scaling * total;
      }
      if (!learns) continue;
      T* dB = job.dB + (expert * job.k + i) * job.rank;
      const T factor = job.scaling * job.importance[i];
      for (int64_t j = 0; j < job.rank; ++j) dB[j] += factor * dw[j];
    }
  }
}
FOR_ALL_VECTORS(grad_scores_task, Scores)

}  // namespace

template <class T>
void shrink(const Down<T>& job) {
  parallel(chunks(job.layout.tokens, kTokens), job.layout.threads, [&](int64_t task) { shrink_task(job, task); });
}

template <class T>
void grad_down(const Down<T>& job) {
  parallel(chunks(job.d, kColumns), job.layout.threads, [&](int64_t task) { grad_down_task(job, task); });
}

template <class T>
void expand(const Up<T>& job) {
  parallel(chunks(job.k, kStrip), job.layout.threads, [&](int64_t task) { expand_task(job, task); });
}

template <class T>
void grad_up(Up<T> job) {
  const int64_t size = kGroups * job.layout.tokens * job.layout.columns();
  const std::unique_ptr<T[]> partial(job.p == nullptr ? nullptr : new T[size]);  // uninitialised: groups without columns are never read
  job.partial_p = partial.get();
  parallel(kGroups, job.layout.threads, [&](int64_t task) { grad_up_task(job, task); });
  if (job.p == nullptr) return;
  parallel(chunks(job.layout.tokens, kTokens), job.layout.threads, [&](int64_t task) { add_partial_p(job, task); });
}

template <class T>
void scores(const Scores<T>& job) {
  parallel(job.experts, job.threads, [&](int64_t expert) { scores_task(job, expert); });
}

template <class T>
void grad_scores(const Scores<T>& job) {
  parallel(chunks(job.k, kColumns), job.threads, [&](int64_t task) { grad_scores_task(job, task); });
}

#define INSTANTIATE(T)                       \
  template void shrink<T>(const Down<T>&);      \
  template void grad_down<T>(const Down<T>&);   \
  template void expand<T>(const Up<T>&);        \
  template void grad_up<T>(Up<T>);              \
  template void scores<T>(const Scores<T>&);    \
  template void grad_scores<T>(const Scores<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace cpu
