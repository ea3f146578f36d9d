// Uninitialised tensors, and memory to work in. The memory of large tensors is kept for the next of either.
//
// Example:
//
//   const Tensor made = empty(x, {x.size(0), x.size(1)});                         // in x's dtype
//   const Tensor positions = empty(x, {x.size(0), x.size(1)}, ScalarType::Byte);  // in another
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace densenet_fast {

// [*size], contiguous
torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                            std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// Kept memory that was used before and is free now, on a cache line; null if there is none of so many bytes
void* kept_scratch(size_t bytes);

// What that, or std::aligned_alloc, returned
void free_scratch(void* memory) noexcept;

}  // namespace densenet_fast
