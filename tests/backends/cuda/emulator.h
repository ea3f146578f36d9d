// Runs the kernels of csrc/cuda on a CPU, thread by thread, to test them where there is no GPU.
//
// Every thread of a block has a stack of its own and runs until a barrier or its end, in the order of the threads or,
// with the environment variable DENSENET_FAST_EMULATED_ORDER=reverse, against it: what depends on the order is a race.
// Shared memory holds NaN at the start of every block. A barrier that only some threads of a block reach is an error.
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

// A stack of its own that a thread runs on, and the way back to where it was resumed from
class Fiber {
 public:
  void (*body)() = nullptr;
  bool finished = false;

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

  void leave() {
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
      fiber.finished = true;
      fiber.leave();
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

// The block that runs
struct Block {
  Fiber* running = nullptr;
  std::vector<unsigned char> shared;
  const void *kernel = nullptr, *params = nullptr;
  Call call = nullptr;
};
inline Block block;

// What went wrong, or null
inline const char* run_block(dim3 size) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  const size_t count = size.x * size.y;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->finished = false;
    fibers[i]->body = [] { block.call(block.kernel, block.params); };
  }
  const char* order = std::getenv("DENSENET_FAST_EMULATED_ORDER");
  const bool reverse = order != nullptr && !std::strcmp(order, "reverse");
  for (size_t finished = 0; finished < count;) {
    for (size_t i = 0; i < count; ++i) {
      const size_t thread = reverse ? count - 1 - i : i;
      threadIdx = {static_cast<unsigned>(thread % size.x), static_cast<unsigned>(thread / size.x), 0};
      block.running = fibers[thread].get();
      block.running->resume();
      finished += block.running->finished;
    }
    if (finished > 0 && finished < count) return "a barrier that only some threads reach";
  }
  return nullptr;
}

inline void __syncthreads() { block.running->leave(); }
inline void* shared_memory() { return block.shared.data(); }

// Those of the kernels that were launched or recorded
inline std::unordered_map<const void*, Call>& calls() {
  static std::unordered_map<const void*, Call> known;
  return known;
}

inline const char* run_grid(const void* kernel, const unsigned (&grid)[3], const unsigned (&threads)[3],
                            size_t shared_bytes, const void* params) {
  if (grid[0] == 0 || grid[1] == 0 || grid[1] > 65535 || threads[0] * threads[1] == 0 ||
      threads[0] * threads[1] > 1024 || grid[2] != 1 || threads[2] != 1 || shared_bytes > 48 << 10)
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
