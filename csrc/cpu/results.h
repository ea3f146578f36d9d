// Tensors that an op returns.
//
// Example:
//
//   const Tensor zeros = new_vector(x, 64);        // [64] float32
//   const Tensor map = image(out, {4, 8, 8});      // [4, C, 8, 8], for out [256, C]
//   const Gradients gradients(tensors);            // like the tensors of stages
#pragma once

#include "stage.h"

namespace densenet_fast {

inline Tensor new_vector(const Tensor& like, int64_t size) {
  Tensor made = new_floats(like, {size});
  std::fill_n(floats_of(made), size, 0.0f);
  return made;
}

// The memory of [M, C] with adjacent rows as [N, C, *spatial], which is not a view; `grid` is (N, *spatial)
inline Tensor image(const Tensor& matrix, const std::vector<int64_t>& grid) {
  std::vector<int64_t> size = grid, strides(grid.size(), matrix.size(1));
  for (size_t i = grid.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * grid[i];
  size.insert(size.begin() + 1, matrix.size(1));
  strides.insert(strides.begin() + 1, 1);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), size.size(), size.data(), strides.data(),
                                                        matrix.storage_offset(), &made));
  return Tensor(made);
}

// Uninitialised float32 of the size and with the strides of `like`
inline Tensor empty_floats_like(const Tensor& like) {
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(ScalarType::Float));
  const auto size = like.sizes(), strides = like.strides();
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), strides.data(), number,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// For the gradients of the tensors of stages, in their places: of the weights and biases of normalisations and the
// weights of convolutions; `trained` are those that there are
struct Gradients {
  std::vector<Tensor> all, trained;

  explicit Gradients(const std::vector<Tensor>& tensors) : all(tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const size_t place = i % kStageTensors;
      if ((place >= 2 && place != 4) || tensors[i].numel() == 0) continue;
      all[i] = empty_floats_like(tensors[i]);
      trained.push_back(all[i]);
    }
  }
};

}  // namespace densenet_fast
