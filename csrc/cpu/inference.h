// What the ops of inference share: a normalisation by running statistics.
//
//   y = (x - mean) * scale + shift,   scale = weight / sqrt(var + eps)
//
// Example:
//
//   const Matrix<const float> m(x, "x");
//   const Matrix<float> result(out, "out");
//   const FrozenNorm norm(tensors.data(), 1e-5, m.cols);  // weight, bias, running_mean, running_var
//   kernels_of<float>().bn_relu(m.from(0), m.rows, m.cols, norm.affine(), result.from(0));  // norm holds the vectors
#pragma once

#include "matrices.h"

namespace densenet_fast {

// weight, bias, running_mean, running_var, [cols] each; the first two are empty if absent
constexpr size_t kNormTensors = 4;

struct FrozenNorm {
  int64_t cols;
  const float* mean;
  std::vector<float> scale, shift;

  FrozenNorm(const Tensor* tensors, double eps, int64_t cols)
      : cols(cols), mean(vector(tensors[2], cols, "running_mean")), scale(cols), shift(cols) {
    const float* var = vector(tensors[3], cols, "running_var");
    const float* weight = tensors[0].numel() > 0 ? vector(tensors[0], cols, "weight") : nullptr;
    kernels().f32.fold(var, eps, weight, cols, scale.data());
    if (tensors[1].numel() > 0) std::copy_n(vector(tensors[1], cols, "bias"), cols, shift.begin());
  }

  Affine affine() const { return {mean, scale.data(), shift.data()}; }
};

}  // namespace densenet_fast
