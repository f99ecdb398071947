// Memory: pointers that check bounds, races on shared memory, and copies that land when they are waited for.
//
// A pointer carries the bounds of the array it came from. Shared memory starts as NaN, and so is the target of a
// cp.async until it is waited for. It is an error if two threads touch the same byte of shared memory, one of them
// writing, with no barrier of both in between: __syncthreads, or __syncwarp within a warp. Other operations of a warp
// order nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>

#include "fibers.h"

namespace emulate {

// bounds of the memory that a launch may touch: address -> size
inline std::map<uintptr_t, size_t> allowed;

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
