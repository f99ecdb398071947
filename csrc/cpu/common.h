// What the passes of a CPU share: SIMD vectors of three widths, chosen at run time, and torch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#define INLINE __attribute__((always_inline)) inline

namespace cpu {

// ---- vectors

// Widths that code is compiled for, in bytes: 64 with AVX-512, 32 with AVX2 and FMA, 16 anywhere.
int widest();
// The width in use: the widest that this CPU has, or a narrower one that a test asked for.
extern int width;

#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET_64 __attribute__((target("avx512f")))
#define TARGET_32 __attribute__((target("avx2,fma")))
#else
#define TARGET_64
#define TARGET_32
#endif

// Defines NAME(job, task) out of the template NAME_body<T, width in bytes>, for float and double in each width.
#define FOR_ALL_VECTORS(NAME, JOB)                                                                    \
  TARGET_64 static void NAME##_64(const JOB<float>& job, int64_t task) { NAME##_body<float, 64>(job, task); }    \
  TARGET_64 static void NAME##_64(const JOB<double>& job, int64_t task) { NAME##_body<double, 64>(job, task); }  \
  TARGET_32 static void NAME##_32(const JOB<float>& job, int64_t task) { NAME##_body<float, 32>(job, task); }    \
  TARGET_32 static void NAME##_32(const JOB<double>& job, int64_t task) { NAME##_body<double, 32>(job, task); }  \
  static void NAME##_16(const JOB<float>& job, int64_t task) { NAME##_body<float, 16>(job, task); }    \
  static void NAME##_16(const JOB<double>& job, int64_t task) { NAME##_body<double, 16>(job, task); }  \
  template <class T>                                                                                  \
  static void NAME(const JOB<T>& job, int64_t task) {                                                 \
    return cpu::width == 64 ? NAME##_64(job, task) : cpu::width == 32 ? NAME##_32(job, task) : NAME##_16(job, task); \
  }

template <class T, int Bytes>
struct Vector {
  typedef T type __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int kSize = Bytes / sizeof(T);
};

template <class T, int Bytes>
INLINE typename Vector<T, Bytes>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T, Bytes>::type*>(from);
}

template <class T, int Bytes>
INLINE void store(T* to, typename Vector<T, Bytes>::type value) {
  *reinterpret_cast<typename Vector<T, Bytes>::type*>(to) = value;
}

// The sum of a vector, halves added until one number is left.
template <class T, int Bytes>
INLINE T sum(typename Vector<T, Bytes>::type value) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return value[0] + value[1];
  } else {
    typedef typename Vector<T, Bytes / 2>::type Half;
    Half low, high;
    std::memcpy(&low, &value, Bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + Bytes / 2, Bytes / 2);
    return sum<T, Bytes / 2>(low + high);
  }
}

// ---- threads

// GOMP_parallel of the OpenMP runtime that torch runs on, so that there is one set of threads; null where it has none.
typedef void (*Gomp)(void (*)(void*), void*, unsigned, unsigned);
inline Gomp gomp() {
#if defined(_WIN32)
  return nullptr;
#else
  static const Gomp found = reinterpret_cast<Gomp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

// Runs body(task) for every task, in any order. No two tasks write the same element, so threads change no bit.
template <class Body>
void parallel(int64_t tasks, int threads, const Body& body) {
  threads = std::min<int64_t>(threads, tasks);
  if (threads < 2 || gomp() == nullptr) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Shared {
    const Body& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
  } shared{body, tasks};
  gomp()(
      [](void* pointer) {
        Shared& mine = *static_cast<Shared*>(pointer);
        for (int64_t task; (task = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.tasks;) mine.body(task);
      },
      &shared, threads, 0);
}

}  // namespace cpu
