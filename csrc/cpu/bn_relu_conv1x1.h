// BN-ReLU-Conv1x1 on matrices, forward and backward.
//
// Example:
//
//   const Matrix<const float> m(x, "x");     // [M, C]
//   const Matrix<float> result(out, "out");  // [M, B], for a weight [B, C]
//   conv1x1<float>(m, affine(mean, scale, shift, m.cols), Weight<float>(weight), nullptr, nullptr, result, nullptr);
#pragma once

#include "shares.h"

namespace densenet_fast {

// out [M, B] = relu(y) @ weight^T + bias [B] for y = bn(x) [M, C], with its statistics unless null; `then` normalised
// and rectified unless null
template <typename T>
void conv1x1(const Matrix<const T>& x, Affine affine, const Weight<T>& weight, const float* bias, const Affine* then,
             const Matrix<T>& out, const StatisticsOutput* statistics) {
  advise_huge_pages(out);
  multiply_described<T>(weight, bias, then, out, statistics, false, 1,
                        [&](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<T> values, T*) {
                          kernels_of<T>().bn_relu(x.from(row, c), rows, cols, affine.from(c), values);
                        });
}

// The gradients of conv1x1: of x, with the sums or these alone, and of the weight [B, C], unless null
template <typename T>
void conv1x1_backward(const ProductGradient<T>& gradient, const Matrix<const T>& x, Affine affine,
                      const Weight<T>& weight, const InputGradient<T>& grad_x, float* grad_weight) {
  const Matrix<const T>* source = grad_x.source;
  const Matrix<T>* total = grad_x.out;
  if (total && source->data != total->data) advise_huge_pages(*total);
  multiply_backward<T>(
      gradient, weight, grad_weight, grad_x.sums,
      [&](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<const float> grad_a, PanelRows a, GradientSums own) {
        Accumulated<T> to = {};
        if (total) to = {source->from(row, c), total->from(row, c)};
        kernels_of<T>().mask_accumulate(grad_a, x.from(row, c), rows, cols, affine.from(c), to, a, own);
      });
}

}  // namespace densenet_fast
