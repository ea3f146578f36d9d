// BN-ReLU-Conv1x1 on matrices, forward and backward.
#pragma once

#include "shares.h"

namespace densenet_fast {

// out [M, B] = relu(y) @ weight^T + bias for y = bn(x) [M, C], with its statistics unless null; `then` normalised and
// rectified unless null
template <typename T>
void conv1x1(const Matrix<const T>& x, Affine affine, const Weight<T>& weight, const float* bias, const Affine* then,
             const Matrix<T>& out, const StatisticsOutput* statistics) {
  advise_huge_pages(out);
  multiply_described<T>(weight, bias, then, out, statistics, false, 1,
                        [&](int64_t row, int64_t rows, int64_t c, int64_t cols, T* values, T*, int64_t ld) {
                          kernels_of<T>().bn_relu(x.row(row) + c, x.ld, rows, cols, affine.from(c), values, ld);
                        });
}

// D = (gradient @ weight) * (y > 0):  total = source + scale * D unless total is null; the rest as multiply_backward
template <typename T>
void conv1x1_backward(const ProductGradient<T>& gradient, const Matrix<const T>& x, Affine affine,
                      const Weight<T>& weight, const Matrix<const T>* source, const Matrix<T>* total,
                      float* grad_weight, float* sums) {
  if (total && source->data != total->data) advise_huge_pages(*total);
  multiply_backward<T>(gradient, weight, grad_weight, sums,
                       [&](int64_t row, int64_t rows, int64_t c, int64_t cols, const float* grad_a, uint32_t* a,
                           int64_t width, float* sum_d, float* sum_dx) {
                         kernels_of<T>().mask_accumulate(grad_a, width, x.row(row) + c, x.ld, rows, cols,
                                                         affine.from(c), total ? source->row(row) + c : nullptr,
                                                         total ? source->ld : 0, total ? total->row(row) + c : nullptr,
                                                         total ? total->ld : 0, a, width, sum_d, sum_dx);
                       });
}

}  // namespace densenet_fast
