// What the ops of inference share: a normalisation by running statistics, and work that threads take when theirs is
// done.
//
//   y = (x - mean) * scale + shift,   scale = weight / sqrt(var + eps)
#pragma once

#include "tiles.h"

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
    const float epsilon = eps;
    for (int64_t c = 0; c < cols; ++c) scale[c] = 1.0f / std::sqrt(var[c] + epsilon);
    if (tensors[0].numel() > 0) {
      const float* weight = vector(tensors[0], cols, "weight");
      for (int64_t c = 0; c < cols; ++c) scale[c] *= weight[c];
    }
    if (tensors[1].numel() > 0) std::copy_n(vector(tensors[1], cols, "bias"), cols, shift.begin());
  }

  Affine affine() const { return {mean, scale.data(), shift.data()}; }
};

// Pieces of work for whoever comes first, such as to prepare what the next parallel region reads
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}

  template <typename F>
  void take(F f) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) f(i);
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

}  // namespace densenet_fast
