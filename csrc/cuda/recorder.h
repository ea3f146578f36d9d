// Launches that are written down instead of made, so that they can be made again without what led to them.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace densenet_fast::cuda {

// The shared memory that a block gets without asking for more
constexpr size_t kSharedBytes = 48 << 10;

// A launch of a kernel that takes one parameter struct
struct Recorded {
  const void* function;
  unsigned grid[3], block[3];
  size_t shared;  // bytes
  std::vector<unsigned char> parameters;
};

// Where this thread's launches go, or null: to the device
inline thread_local std::vector<Recorded>* recorder = nullptr;

// Whether the launch went there; Dim is dim3
template <typename Params, typename Dim>
bool record(void (*kernel)(Params), Dim grid, Dim block, size_t shared, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>);
  if (recorder == nullptr) return false;
  std::vector<unsigned char> bytes(sizeof(Params));
  std::memcpy(bytes.data(), &params, sizeof(Params));
  recorder->push_back({reinterpret_cast<const void*>(kernel),
                       {grid.x, grid.y, grid.z},
                       {block.x, block.y, block.z},
                       shared,
                       std::move(bytes)});
  return true;
}

}  // namespace densenet_fast::cuda
