// The ops of BN-ReLU-Conv1x1.
#include "bn_relu_conv1x1.h"

#include <tuple>

namespace densenet_fast {
namespace {

// out = relu(y) @ weight^T + bias, with its statistics if they are given places; normalised by `then` and rectified if
// that is given
void bn_relu_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, std::optional<Tensor> bias,
                     Tensor out, std::optional<Tensor> out_mean, std::optional<Tensor> out_var,
                     std::optional<Tensor> out_rstd, double eps, std::optional<Tensor> then_mean,
                     std::optional<Tensor> then_scale, std::optional<Tensor> then_shift) {
  // [M, C], [C] each, [B, C], [B], [M, B], [B] each
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Weight<T> w(weight, m.cols);
    const Matrix<T> z(out, "out");
    STD_TORCH_CHECK(z.rows == m.rows && z.cols == w.rows, "out: expected [M, B]");
    const std::optional<StatisticsOutput> statistics = optional_statistics(out_mean, out_var, out_rstd, eps, w.rows);
    const std::optional<Affine> then = optional_affine(then_mean, then_scale, then_shift, w.rows);
    conv1x1<T>(m, affine(mean, scale, shift, m.cols), w, vector(bias, w.rows, "bias"), or_null(then), z,
               or_null(statistics));
  });
}

// With z, grad is first completed by what reaches z through its batch statistics (1).
// D = (grad @ weight) * (y > 0):  grad_x = source + scale * D, by default grad_x's own values,  dW = grad^T @ relu(y),
// sum D, sum D * (x - mean)
std::tuple<Tensor, Tensor> bn_relu_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift,
                                                    Tensor weight, std::optional<Tensor> grad_x, bool need_weight,
                                                    bool need_sums, std::optional<Tensor> z,
                                                    std::optional<Tensor> z_mean, std::optional<Tensor> p,
                                                    std::optional<Tensor> q, double count,
                                                    std::optional<Tensor> source) {
  // [M, B], [M, C], [C] each, [B, C], [M, C], [M, B], [B] each, [M, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Weight<T> w(weight);
    ProductGradient<T> gradient = {g, {}};
    if (z) {
      STD_TORCH_CHECK(z_mean && p && q, "z: expected with z_mean, p and q");
      gradient.finalise.emplace(*z, *z_mean, *p, *q, count);
      gradient.finalise->check(g);
    }
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == w.rows && w.cols == m.cols, "grad, x, weight: sizes do not match");
    std::optional<Matrix<T>> total;
    std::optional<Matrix<const T>> before;
    if (grad_x) {
      total.emplace(*grad_x, "grad_x");
      check_shape(*total, m, "grad_x");
      before.emplace(source ? *source : *grad_x, "source");
      check_shape(*before, m, "source");
    }
    Tensor grad_weight = need_weight ? new_floats(x, {w.rows, w.cols}) : nothing(x);
    Tensor sums = grad_x || need_sums ? new_floats(x, {2, w.cols}) : nothing(x);
    conv1x1_backward<T>(gradient, m, affine(mean, scale, shift, m.cols), w,
                        {or_null(before), or_null(total), grad_x || need_sums ? floats_of(sums) : nullptr},
                        need_weight ? floats_of(grad_weight) : nullptr);
    return std::tuple(grad_weight, sums);
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_conv1x1));
  m.impl("cpu_bn_relu_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_conv1x1_backward));
}
