// A grid of thread blocks as fibers on one CPU thread: barriers, operations of a warp, and the scheduler.
//
// A fiber runs until it waits. Barriers count their arrivals, of a warp, a block or the grid, and the last lane to
// arrive carries out a collective operation. When nobody can run and somebody waits, the launch fails and says who
// waits where.
#pragma once

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
#include <vector>

#include <ucontext.h>

#include "language.h"

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

// Who wrote a byte of shared memory last, and who has read it since: threads, and how many barriers of their block and
// warp they had passed.
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
}  // namespace emulate
