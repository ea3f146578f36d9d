// Uninitialised tensors. The memory of large ones is kept for the next.
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

}  // namespace densenet_fast
