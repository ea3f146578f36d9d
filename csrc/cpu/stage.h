// A stage as the ops take it: its normalisation, with the gradients through it, and its convolution.
//
// Example:
//
//   const Matrix<const float> m(x, "x");
//   const Norm norm(tensors.data(), 1e-5, m.cols);  // the first of a stage's six tensors
//   const Folded folded = norm.fold(floats_of(mean), floats_of(var));
//   kernels_of<float>().bn_relu(m.from(0), m.rows, m.cols, folded.affine(), Matrix<float>(out, "out").from(0));
#pragma once

#include "statistics.h"

namespace densenet_fast {

// weight, bias, running_mean, running_var, the convolution's weight and bias; empty if absent
constexpr size_t kStageTensors = 6;

// The tensors of so many stages from those that are there, whose `places` are given; the others are empty
inline std::vector<Tensor> in_places(const std::vector<Tensor>& present, const std::vector<int64_t>& places,
                                     size_t stages, const Tensor& like) {
  std::vector<Tensor> all(kStageTensors * stages, nothing(like));
  STD_TORCH_CHECK(present.size() == places.size(), "places: expected ", present.size(), ", got ", places.size());
  for (size_t i = 0; i < places.size(); ++i) all.at(places[i]) = present[i];
  return all;
}

inline const float* optional_vector(const Tensor& t, int64_t cols, const char* name) {
  return t.numel() == 0 ? nullptr : vector(t, cols, name);
}

// y = (x - mean) * scale + shift with scale = weight * r
struct Folded {
  const float* mean;
  std::vector<float> r, scale, shift;

  Affine affine() const { return {mean, scale.data(), shift.data()}; }
};

// A normalisation by the batch's statistics; a frozen one has running statistics and uses them
struct Norm {
  int64_t cols;
  const float *weight, *bias, *running_mean, *running_var;
  float eps;

  Norm(const Tensor* tensors, double eps, int64_t cols)
      : cols(cols),
        weight(optional_vector(tensors[0], cols, "weight")),
        bias(optional_vector(tensors[1], cols, "bias")),
        running_mean(optional_vector(tensors[2], cols, "running_mean")),
        running_var(optional_vector(tensors[3], cols, "running_var")),
        eps(eps) {
    STD_TORCH_CHECK((running_mean == nullptr) == (running_var == nullptr), "running_mean: expected with running_var");
  }

  bool frozen() const { return running_mean != nullptr; }

  // `mean` and `var` are the batch's
  Folded fold(const float* mean, const float* var) const {
    Folded f = {frozen() ? running_mean : mean, zeros(cols), zeros(cols), zeros(cols)};
    const float* v = frozen() ? running_var : var;
    for (int64_t c = 0; c < cols; ++c) {
      f.r[c] = 1.0f / std::sqrt(v[c] + eps);
      f.scale[c] = weight ? weight[c] * f.r[c] : f.r[c];
      f.shift[c] = bias ? bias[c] : 0.0f;
    }
    return f;
  }

  // From the sums over D (sums D, sums D * (x - mean)): the gradients of weight and bias, the first two of `gradients`,
  // and what the normalisation adds to P and Q unless it is frozen (2)
  void collect(const Folded& folded, const float* sums, const Tensor* gradients, float* p, float* q) const {
    const float *sum_d = sums, *sum_dx = sums + cols;
    float* grad_weight = weight ? output(gradients[0], cols, "grad_weight") : nullptr;
    float* grad_bias = bias ? output(gradients[1], cols, "grad_bias") : nullptr;
    for (int64_t c = 0; c < cols; ++c) {
      const float r = folded.r[c], s = folded.scale[c];
      if (grad_weight) grad_weight[c] = r * sum_dx[c];
      if (grad_bias) grad_bias[c] = sum_d[c];
      if (frozen()) continue;
      p[c] = std::fma(-s, sum_d[c], p[c]);  // rounded once, as by torch's addcmul
      q[c] = std::fma(-0.5f * (s * r * r), sum_dx[c], q[c]);
    }
  }
};

// BN-ReLU-convolution
struct Stage : Norm {
  const Tensor& conv;

  Stage(const Tensor* tensors, double eps, int64_t cols) : Norm(tensors, eps, cols), conv(tensors[4]) {
    STD_TORCH_CHECK(conv.dim() >= 3 && conv.size(1) == cols, "convolution: expected a weight of ", cols,
                    " input channels");
    STD_TORCH_CHECK(tensors[5].numel() == 0, "convolution: expected no bias");
  }
};

}  // namespace densenet_fast
