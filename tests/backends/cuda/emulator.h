// Runs the kernels of csrc/cuda on a CPU, thread by thread, to test them where there is no GPU.
//
// Every thread of a block has a stack of its own and runs until a barrier or its end, in the order of the threads or,
// with the environment variable DENSENET_FAST_EMULATED_ORDER=reverse, against it: what depends on the order is a race.
// Shared memory holds NaN at the start of every block. A barrier that only some threads of a block reach is an error.
// An instruction of a warp is executed once all of its lanes have reached it (emulated_tensor_cores.h).
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "recorder.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __launch_bounds__(...)

namespace densenet_fast::cuda {

inline uint3 threadIdx, blockIdx, gridDim;

using std::sqrt;

// A copy to shared memory that its thread has begun
struct Copy {
  unsigned place;
  const void* from;
  int bytes;
};

// What keeps a thread from going on
enum class Stop { none, barrier, warp, end };

// A stack of its own that a thread runs on, and the way back to where it was resumed from
class Fiber {
 public:
  void (*body)() = nullptr;
  Stop stop = Stop::none;
  std::vector<std::vector<Copy>> copies;  // groups that it has not waited for; the last is not committed yet

  Fiber() {
    getcontext(&context_);
    context_.uc_stack = {stack_.get(), 0, kStack};
    context_.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    makecontext(&context_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* own;
    __sanitizer_start_switch_fiber(&own, stack_.get(), kStack);
    swapcontext(&outside_, &context_);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#else
    if (_setjmp(back_)) return;
    if (started_) _longjmp(jump_, 1);
    started_ = true;
    setcontext(&context_);
#endif
  }

  void leave(Stop why) {
    stop = why;
#if defined(__SANITIZE_ADDRESS__)
    void* own;
    __sanitizer_start_switch_fiber(&own, outside_stack_, outside_bytes_);
    swapcontext(&context_, &outside_);
    __sanitizer_finish_switch_fiber(own, &outside_stack_, &outside_bytes_);
#else
    if (!_setjmp(jump_)) _longjmp(back_, 1);
#endif
  }

 private:
  static constexpr size_t kStack = 64 << 10;

  static void enter(unsigned high, unsigned low) {
    Fiber& fiber = *reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber.outside_stack_, &fiber.outside_bytes_);
#endif
    for (;;) {
      fiber.body();
      fiber.leave(Stop::end);
    }
  }

  std::unique_ptr<char[]> stack_{new char[kStack]};
  ucontext_t context_;
#if defined(__SANITIZE_ADDRESS__)
  ucontext_t outside_;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
#else
  jmp_buf jump_, back_;
  bool started_ = false;
#endif
};

// Runs a kernel, whose type the pointer has lost, on parameters at any address
using Call = void (*)(const void* kernel, const void* params);

constexpr unsigned kWarp = 32;

// The block that runs
struct Block {
  Fiber* running = nullptr;
  std::vector<unsigned char> shared;
  const void *kernel = nullptr, *params = nullptr;
  Call call = nullptr;
  const char* fault = nullptr;
  void (*instruction)() = nullptr;  // of the warp that runs, for all of its lanes
};
inline Block block;

inline bool in_reverse() {
  const char* order = std::getenv("DENSENET_FAST_EMULATED_ORDER");
  return order != nullptr && !std::strcmp(order, "reverse");
}

// Threads `first` to `last` of the block until each is at a barrier or its end; what went wrong, or null
inline const char* run_warp(std::vector<std::unique_ptr<Fiber>>& fibers, size_t first, size_t last, unsigned width,
                            bool reverse) {
  for (;;) {
    size_t waiting = 0;
    for (size_t i = first; i < last; ++i) {
      const size_t thread = reverse ? last - 1 - (i - first) : i;
      Fiber& fiber = *fibers[thread];
      if (fiber.stop == Stop::barrier || fiber.stop == Stop::end) continue;
      threadIdx = {static_cast<unsigned>(thread % width), static_cast<unsigned>(thread / width), 0};
      block.running = &fiber;
      fiber.resume();
      waiting += fiber.stop == Stop::warp;
    }
    if (block.fault != nullptr) return block.fault;
    if (waiting == 0) return nullptr;
    if (waiting != kWarp) return "an instruction of a warp that only some lanes reach";
    block.instruction();
    block.instruction = nullptr;
  }
}

// What went wrong, or null
inline const char* run_block(dim3 size) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  const size_t count = size.x * size.y, warps = (count + kWarp - 1) / kWarp;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->stop = Stop::none;
    fibers[i]->copies.assign(1, {});
    fibers[i]->body = [] { block.call(block.kernel, block.params); };
  }
  block.fault = nullptr, block.instruction = nullptr;
  const bool reverse = in_reverse();
  for (size_t finished = 0; finished < count;) {
    for (size_t i = 0; i < warps; ++i) {
      const size_t first = (reverse ? warps - 1 - i : i) * kWarp;
      const size_t last = first + kWarp < count ? first + kWarp : count;
      if (const char* error = run_warp(fibers, first, last, size.x, reverse)) {
        fibers.clear();  // stopped in the middle
        return error;
      }
    }
    finished = 0;
    for (size_t i = 0; i < count; ++i) finished += fibers[i]->stop == Stop::end;
    if (finished > 0 && finished < count) {
      fibers.clear();
      return "a barrier that only some threads reach";
    }
    for (size_t i = 0; i < count; ++i)
      if (finished == 0) fibers[i]->stop = Stop::none;
  }
  for (size_t i = 0; i < count; ++i)
    for (const std::vector<Copy>& group : fibers[i]->copies)
      if (!group.empty()) return "copies to shared memory that their thread does not wait for";
  return nullptr;
}

inline void __syncthreads() { block.running->leave(Stop::barrier); }
inline void* shared_memory() { return block.shared.data(); }

// Those of the kernels that were launched or recorded
inline std::unordered_map<const void*, Call>& calls() {
  static std::unordered_map<const void*, Call> known;
  return known;
}

inline const char* run_grid(const void* kernel, const unsigned (&grid)[3], const unsigned (&threads)[3],
                            size_t shared_bytes, const void* params) {
  if (grid[0] == 0 || grid[1] == 0 || grid[1] > 65535 || threads[0] * threads[1] == 0 ||
      threads[0] * threads[1] > 1024 || grid[2] != 1 || threads[2] != 1 || shared_bytes > 227 << 10)
    return "invalid configuration";
  block.kernel = kernel;
  block.call = calls().at(kernel);
  block.params = params;
  gridDim = {grid[0], grid[1], grid[2]};
  for (unsigned y = 0; y < grid[1]; ++y)
    for (unsigned x = 0; x < grid[0]; ++x) {
      blockIdx = {x, y, 0};
      std::vector<unsigned char>(shared_bytes, 0xFF).swap(block.shared);
      if (const char* error = run_block({threads[0], threads[1], 1})) return error;
    }
  return nullptr;
}

template <typename Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes, void*, const Params& params) {
  const void* pointer = reinterpret_cast<const void*>(kernel);
  calls()[pointer] = [](const void* function, const void* bytes) {
    Params p;
    std::memcpy(&p, bytes, sizeof(p));
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(function))(p);
  };
  if (record(kernel, grid, threads, shared_bytes, params)) return nullptr;
  return run_grid(pointer, {grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z}, shared_bytes, &params);
}

}  // namespace densenet_fast::cuda
