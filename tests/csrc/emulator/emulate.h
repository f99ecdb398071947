// A grid of thread blocks on the CPU, for tests: what ptx.cuh and CUDA's own language give, under the same names.
//
// Every CUDA thread is a fiber that runs until it waits. Barriers count their arrivals, of a warp, a block or the grid,
// and collective operations are carried out by the last lane to arrive; when nobody can run and somebody waits, the
// launch fails and says who waits where. Pointers carry the bounds of the array they came from, and check every access.
// Shared memory starts as NaN, and a cp.async lands only when it is waited for: until then its target is NaN. Two threads
// that touch the same byte of it, one of them writing, with no barrier of both in between are an error: __syncthreads,
// or __syncwarp in a warp. Other operations of a warp order nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

struct Copy {
  char* to;
  char bytes[16];
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false, busy = false;  // busy: has a thread to run
  const char* waits = nullptr;         // for what, nullptr if it can run
  dim3 thread;
  int index = 0, block = 0;
  std::deque<std::vector<Copy>> groups;  // committed cp.async, oldest first
  std::vector<Copy> copies;              // not yet committed
};

// Who has last written a byte of shared memory, and who has read it since: threads, and how many barriers of their block
// and warp they had passed.
struct Touched {
  static constexpr int kNobody = -1, kSeveral = -2;
  int writer = kNobody, reader = kNobody, reading_warp = kNobody;
  unsigned write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
};

struct Warp {
  int arrived = 0;
  unsigned barriers = 0;
  const char* operation = nullptr;
  uint32_t in[kWarp][8];
  uint32_t out[kWarp][4];
  const char* address[kWarp];
};

struct Block {
  dim3 id;
  std::vector<char> shared;
  std::vector<Touched> touched;  // of each byte of `shared`
  std::vector<Warp> warps;
  int arrived = 0, returned = 0;
  unsigned barriers = 0;
};

// bounds of the memory that a launch may touch: address -> size
inline std::map<uintptr_t, size_t> allowed;
inline bool reversed = false;  // run threads and blocks from the last to the first
inline int processors = 5;     // blocks that a cooperative launch may have
inline std::string left_out_file;
inline int left_out_line = 0;

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Block> blocks;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::string failure;
inline int threads_in_block = 0, arrived_in_grid = 0;

inline void to_scheduler() {
  Fiber* self = current;
  if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
  threadIdx = self->thread;
  blockIdx = blocks[self->block].id;
}

[[noreturn]] inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  char where[128];
  snprintf(where, sizeof where, " (thread %u of block %u,%u,%u)", threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
  failure = std::string(text) + where;
  _longjmp(scheduler, 1);
}

inline void entry() {
  for (;;) {
    body();
    current->busy = false;
    ++blocks[current->block].returned;
    current->groups.clear();
    current->copies.clear();
    to_scheduler();
  }
}

inline void wait_for(const char* what) {
  current->waits = what;
  to_scheduler();
}

inline Block& block() { return blocks[current->block]; }
inline int lane() { return current->index % kWarp; }
inline Warp& warp() { return block().warps[current->index / kWarp]; }

inline void release(int first, int count) {
  for (int i = first; i < first + count; ++i) fibers[i]->waits = nullptr;
}

inline void sync_block() {
  Block& b = block();
  if (++b.arrived == threads_in_block) {
    b.arrived = 0;
    ++b.barriers;
    release(current->block * threads_in_block, threads_in_block);
  } else {
    wait_for("__syncthreads");
  }
}

inline void sync_grid() {
  if (++arrived_in_grid == static_cast<int>(blocks.size()) * threads_in_block) {
    arrived_in_grid = 0;
    for (Block& b : blocks) ++b.barriers;
    release(0, static_cast<int>(blocks.size()) * threads_in_block);
  } else {
    wait_for("grid_barrier");
  }
}

// A warp's operation: each lane has left its operands in warp(), the last one to arrive carries it out for all.
inline void collective(const char* operation, void (*carry_out)(Warp&)) {
  Warp& w = warp();
  if (w.arrived == 0) w.operation = operation;
  if (std::strcmp(w.operation, operation) != 0) {
    fail("lanes of one warp are at different operations, %s and %s", w.operation, operation);
  }
  if (++w.arrived == kWarp) {
    carry_out(w);
    w.arrived = 0;
    release(current->block * threads_in_block + current->index / kWarp * kWarp, kWarp);
  } else {
    wait_for(operation);
  }
}

inline void sync_warp() {
  collective("__syncwarp", [](Warp& w) { ++w.barriers; });
}

// A barrier of the sources, unless it is the one that is left out to see what comes of it.
inline void barrier(const char* file, int line, void (*wait)()) {
  if (line == left_out_line && std::string(file).find(left_out_file) != std::string::npos) return;
  wait();
}

inline void schedule(int count) {
  volatile int left = count;
  while (left > 0) {
    volatile bool ran = false;
    for (volatile int i = 0; i < count; ++i) {
      Fiber* f = fibers[reversed ? count - 1 - i : i].get();
      if (!f->busy || f->waits != nullptr) continue;
      ran = true;
      current = f;
      threadIdx = f->thread;
      blockIdx = blocks[f->block].id;
      if (_setjmp(scheduler) == 0) {
        if (f->started) _longjmp(f->at, 1);
        f->started = true;
        setcontext(&f->start);
      }
      if (!failure.empty()) return;
      if (!current->busy) left = left - 1;
    }
    if (!ran) {
      std::map<std::string, int> waiting;
      for (int i = 0; i < count; ++i) {
        if (fibers[i]->busy) ++waiting[fibers[i]->waits];
      }
      failure = "deadlock:";
      for (auto& [what, number] : waiting) failure += " " + std::to_string(number) + " threads wait at " + what + ",";
      failure += " " + std::to_string(count - left) + " have returned";
      return;
    }
  }
}

inline void run(const char* name, std::vector<dim3> ids, int threads, size_t shared) {
  const int count = static_cast<int>(ids.size()) * threads;
  threads_in_block = threads;
  arrived_in_grid = 0;
  failure.clear();
  blocks.resize(ids.size());
  for (size_t b = 0; b < ids.size(); ++b) {
    blocks[b].id = ids[b];
    blocks[b].shared.assign(shared + 128, static_cast<char>(0xFF));
    blocks[b].touched.assign(shared + 128, Touched());
    blocks[b].warps.assign(threads / kWarp, Warp());
    blocks[b].arrived = blocks[b].returned = 0;
    blocks[b].barriers = 0;
  }
  while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < count; ++i) {
    Fiber& f = *fibers[i];
    f.index = i % threads;
    f.block = i / threads;
    f.thread = dim3(f.index, 0, 0);
    f.busy = true;
    f.waits = nullptr;
    if (!f.started) {
      if (!f.stack) f.stack.reset(new char[kStack]);
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, entry, 0);
    }
  }
  schedule(count);
  if (!failure.empty()) {
    for (auto& f : fibers) {  // what they were doing is forgotten
      f->started = f->busy = false;
      f->groups.clear();
      f->copies.clear();
    }
    throw std::runtime_error(std::string(name) + ": " + failure);
  }
}

inline void check_access(const char* at, size_t bytes, const char* low, const char* high) {
  if (at < low || at + bytes > high) {
    fail("access of %zu bytes at %td of an array of %td bytes", bytes, at - low, high - low);
  }
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("%zu bytes at a misaligned address", bytes);
}

// Notes that this thread reads or writes bytes, if they are of shared memory.
inline void touch(const char* at, size_t bytes, bool writes) {
  Block& b = block();
  if (at < b.shared.data() || at >= b.shared.data() + b.shared.size()) return;
  const int thread = current->index, its_warp = thread / kWarp;
  const unsigned in_warp = warp().barriers;
  for (size_t i = 0; i < bytes; ++i) {
    Touched& t = b.touched[at - b.shared.data() + i];
    const auto race = [&](const char* other, int who) {
      char name[32] = "several threads";
      if (who >= 0) snprintf(name, sizeof name, "thread %d", who);
      fail("race: shared memory is %s here and %s by %s, with no barrier in between", writes ? "written" : "read",
           other, name);
    };
    if (t.writer != Touched::kNobody && t.writer != thread && t.write_block == b.barriers &&
        !(t.writer / kWarp == its_warp && t.write_warp < in_warp)) {
      race("written", t.writer);
    }
    if (t.read_block != b.barriers) t.reader = Touched::kNobody;
    if (!writes) {
      if (t.reader == Touched::kNobody) {
        t.reader = thread, t.reading_warp = its_warp;
      } else if (t.reader != thread) {
        t.reader = Touched::kSeveral;
        if (t.reading_warp != its_warp) t.reading_warp = Touched::kSeveral;
      }
      t.read_block = b.barriers, t.read_warp = in_warp;
      continue;
    }
    if (t.reader != Touched::kNobody && t.reader != thread && !(t.reading_warp == its_warp && t.read_warp < in_warp)) {
      race("read", t.reader);
    }
    t.writer = thread, t.write_block = b.barriers, t.write_warp = in_warp;
    t.reader = Touched::kNobody;
  }
}

}  // namespace emulate

// An element that a Ptr leads to.
template <class T>
class Element {
 public:
  explicit Element(T* at) : at_(at) {}
  operator T() const {
    emulate::touch(reinterpret_cast<const char*>(at_), sizeof(T), false);
    return *at_;
  }
  Element& operator=(const T& v) {
    emulate::touch(reinterpret_cast<const char*>(at_), sizeof(T), true);
    *at_ = v;
    return *this;
  }
  Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
  Element& operator+=(const T& v) { return *this = *this + v; }
  T* operator&() const { return at_; }

 private:
  T* at_;
};

template <class T>
T min(T a, const Element<T>& b) {
  return std::min<T>(a, b);
}

// A pointer into one array, global or shared.
template <class T>
class Ptr {
 public:
  Ptr() = default;
  Ptr(T* at, const char* low, const char* high) : at_(at), low_(low), high_(high) {}
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  Ptr(const Ptr<U>& p) : at_(p.raw()), low_(p.low()), high_(p.high()) {}

  // the value, where it cannot be written
  std::conditional_t<std::is_const_v<T>, std::remove_const_t<T>, Element<T>> operator[](int64_t i) const {
    const char* at = reinterpret_cast<const char*>(at_) + i * static_cast<int64_t>(sizeof(T));
    emulate::check_access(at, sizeof(T), low_, high_);
    if constexpr (std::is_const_v<T>) {
      emulate::touch(at, sizeof(T), false);
      return at_[i];
    } else {
      return Element<T>(at_ + i);
    }
  }
  auto operator*() const { return (*this)[0]; }
  Ptr operator+(int64_t i) const {
    return Ptr(reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(at_) + i * static_cast<int64_t>(sizeof(T))), low_,
               high_);
  }
  T* raw() const { return at_; }
  const char* low() const { return low_; }
  const char* high() const { return high_; }

 private:
  T* at_ = nullptr;
  const char* low_ = nullptr;
  const char* high_ = nullptr;
};

template <class T>
Ptr<T> global(const void* p) {
  if (p == nullptr) return Ptr<T>();
  const auto address = reinterpret_cast<uintptr_t>(p);
  auto range = emulate::allowed.upper_bound(address);
  if (range == emulate::allowed.begin()) emulate::fail("a pointer to no tensor of this launch");
  --range;
  if (address >= range->first + range->second) emulate::fail("a pointer to no tensor of this launch");
  const char* low = reinterpret_cast<const char*>(range->first);
  return Ptr<T>(static_cast<T*>(const_cast<void*>(p)), low, low + range->second);
}

template <class U, class T>
Ptr<U> view(const Ptr<T>& p) {
  return Ptr<U>(reinterpret_cast<U*>(p.raw()), p.low(), p.high());
}

class SmemAllocator {
 public:
  SmemAllocator() {
    auto start = (reinterpret_cast<uintptr_t>(emulate::block().shared.data()) + 127) / 128 * 128;
    next_ = reinterpret_cast<char*>(start);
    end_ = next_ + emulate::block().shared.size() - 128;
  }
  template <class T>
  Ptr<T> take(int count) {
    char* low = next_;
    next_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    if (next_ > end_) emulate::fail("the block takes %td bytes more shared memory than it asked for", next_ - end_);
    return Ptr<T>(reinterpret_cast<T*>(low), low, low + count * sizeof(T));
  }

 private:
  char* next_;
  char* end_;
};

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t bits_of_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) {
  const uint32_t exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa), (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return v.bits >> 15 ? -size : size;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t bits = bits_of_float(v);
  if (std::isnan(v)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float v) {
  const uint16_t sign = bits_of_float(v) >> 16 & 0x8000;
  const float size = std::fabs(v);
  if (std::isnan(v)) return {0x7FFF};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (size == 0) return {sign};
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, -14);  // of the leading bit; below -14 numbers are subnormal
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // ties to even
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

template <class T>
void round_pair(float& a, float& b) {
  a = to_float(from_float<T>(a)), b = to_float(from_float<T>(b));
}

template <class T>
float half_of_word(uint32_t word, int which) {
  return to_float(T{static_cast<uint16_t>(which ? word >> 16 : word)});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(!std::is_same_v<T, float>);
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  std::memcpy(w.in[lane], a, 16);
  w.in[lane][4] = b0;
  w.in[lane][5] = b1;
  emulate::collective("mma", [](emulate::Warp& w) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = l % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * q + r / 2 * 8 + i] = half_of_word<T>(w.in[l][r], i);
        for (int r = 0; r < 2; ++r) b[2 * q + r * 8 + i][g] = half_of_word<T>(w.in[l][4 + r], i);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        w.out[l][i] = bits_of_float(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] += float_of_bits(w.out[lane][i]);
}

template <bool TRANSPOSED, class T>
void ldmatrix_x4(uint32_t (&r)[4], Ptr<const T> row) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.address[lane] = reinterpret_cast<const char*>(row.raw());
  emulate::check_access(w.address[lane], 16, row.low(), row.high());
  emulate::touch(w.address[lane], 16, false);
  emulate::collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", [](emulate::Warp& w) {
    for (int l = 0; l < 32; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[2];
        for (int i = 0; i < 2; ++i) {
          const int row = TRANSPOSED ? l % 4 * 2 + i : l / 4, column = TRANSPOSED ? l / 4 : l % 4 * 2 + i;
          std::memcpy(&element[i], w.address[matrix * 8 + row] + 2 * column, 2);
        }
        std::memcpy(&w.out[l][matrix], element, 4);
      }
    }
  });
  std::memcpy(r, w.out[lane], 16);
}

template <class T>
void cp_async16(Ptr<T> to, std::common_type_t<Ptr<const T>> from) {
  auto* target = reinterpret_cast<char*>(to.raw());
  emulate::check_access(target, 16, to.low(), to.high());
  emulate::check_access(reinterpret_cast<const char*>(from.raw()), 16, from.low(), from.high());
  emulate::touch(target, 16, true);
  emulate::Copy copy{target, {}};
  std::memcpy(copy.bytes, from.raw(), 16);
  std::memset(target, 0xFF, 16);
  emulate::current->copies.push_back(copy);
}
inline void cp_async_commit() {
  emulate::current->groups.push_back(std::move(emulate::current->copies));
  emulate::current->copies.clear();
}
template <int PENDING>
void cp_async_wait() {
  auto& groups = emulate::current->groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulate::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
  }
}

inline float shuffle_xor(float v, int lanes) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.in[lane][0] = bits_of_float(v);
  w.in[lane][1] = lanes;
  emulate::collective("shuffle", [](emulate::Warp& w) {
    for (int l = 0; l < 32; ++l) w.out[l][0] = w.in[l ^ w.in[l][1]][0];
  });
  return float_of_bits(w.out[lane][0]);
}

inline uint32_t lanes_where(bool yes) {
  emulate::Warp& w = emulate::warp();
  const int lane = emulate::lane();
  w.in[lane][0] = yes;
  emulate::collective("ballot", [](emulate::Warp& w) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) bits |= w.in[l][0] << l;
    for (int l = 0; l < 32; ++l) w.out[l][0] = bits;
  });
  return w.out[lane][0];
}

#define __syncthreads() emulate::barrier(__FILE__, __LINE__, emulate::sync_block)
#define __syncwarp() emulate::barrier(__FILE__, __LINE__, emulate::sync_warp)
#define grid_barrier() emulate::barrier(__FILE__, __LINE__, emulate::sync_grid)
inline void __threadfence() {}
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }

inline uint32_t bytes_at_least(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) out |= (a >> i & 255) >= (b >> i & 255) ? 255u << i : 0;
  return out;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }

template <class... P>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared, void*, bool cooperative,
            P... arguments) {
  if (threads % emulate::kWarp != 0) throw std::runtime_error(std::string(name) + ": threads must fill warps");
  if (shared > 99 * 1024) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) + " bytes of shared memory");
  }
  gridDim = grid;
  blockDim = dim3(threads);
  emulate::body = [=] { kernel(arguments...); };
  std::vector<dim3> ids;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) ids.push_back(dim3(x, y, z));
    }
  }
  if (cooperative) {
    if (!ids.empty()) emulate::run(name, ids, threads, shared);
    return;
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    emulate::run(name, {ids[emulate::reversed ? ids.size() - 1 - i : i]}, threads, shared);
  }
}

template <class... P>
int resident_blocks(const char*, void (*)(P...), int, size_t) {
  return emulate::processors;
}

inline void use_device(int) {}
