// BN-ReLU-Conv1x1, forward and backward.
#include "products.h"

namespace densenet_fast {
namespace {

// out = relu(y) @ weight^T + bias, with its statistics if they are given places; normalised by `then` and rectified if that
// is given
void bn_relu_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, std::optional<Tensor> bias,
                     Tensor out, std::optional<Tensor> out_mean, std::optional<Tensor> out_var,
                     std::optional<Tensor> out_rstd, double eps, std::optional<Tensor> then_mean,
                     std::optional<Tensor> then_scale, std::optional<Tensor> then_shift) {
  // [M, C], [C] each, [B, C], [B], [M, B], [B] each
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x"), w(weight, "weight");
    STD_TORCH_CHECK(w.cols == m.cols, "weight: expected ", m.cols, " columns, got ", w.cols);
    const Affine a = affine(mean, scale, shift, m.cols);
    const Matrix<T> z(out, "out");
    STD_TORCH_CHECK(z.rows == m.rows && z.cols == w.rows, "out: expected [M, B]");
    STD_TORCH_CHECK(out_mean.has_value() == out_var.has_value() && out_mean.has_value() == out_rstd.has_value(),
                    "out_mean: expected with out_var and out_rstd");
    const std::optional<Affine> then = optional_affine(then_mean, then_scale, then_shift, w.rows);
    advise_huge_pages(z);
    const Tiles tiles = product_tiles(m.rows);
    TileStatistics statistics(tiles, out_mean ? w.rows : 0);
    multiply<T>(w, bias ? vector(*bias, w.rows, "bias") : nullptr, then ? &*then : nullptr, z, tiles,
                out_mean ? &statistics : nullptr,
                [&](int64_t row, int64_t rows, int64_t c, int64_t cols, T* values, int64_t ld) {
                  kernels_of<T>().bn_relu(m.row(row) + c, m.ld, rows, cols, a.from(c), values, ld);
                });
    if (out_mean) statistics.combine(tiles, {*out_mean, *out_var, *out_rstd, eps, w.rows});
  });
}

// With z, grad is first completed by what reaches z through its batch statistics (1).
// D = (grad @ weight) * (y > 0):  grad_x = source + scale * D, by default grad_x's own values,  dW = grad^T @ relu(y),  sum D,  sum D * (x - mean)
std::tuple<Tensor, Tensor> bn_relu_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift,
                                                    Tensor weight, std::optional<Tensor> grad_x, bool need_weight,
                                                    bool need_sums, std::optional<Tensor> z,
                                                    std::optional<Tensor> z_mean, std::optional<Tensor> p,
                                                    std::optional<Tensor> q, double count,
                                                    std::optional<Tensor> source) {
  // [M, B], [M, C], [C] each, [B, C], [M, C], [M, B], [B] each, [M, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x"), w(weight, "weight");
    ProductGradient<T> gradient = {g, {}};
    if (z) {
      STD_TORCH_CHECK(z_mean && p && q, "z: expected with z_mean, p and q");
      gradient.finalise.emplace(*z, *z_mean, *p, *q, count);
      gradient.finalise->check(g);
    }
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == w.rows && w.cols == m.cols, "grad, x, weight: sizes do not match");
    const Affine affine_x = affine(mean, scale, shift, m.cols);
    std::optional<Matrix<T>> total;
    std::optional<Matrix<const T>> before;
    if (grad_x) {
      total.emplace(*grad_x, "grad_x");
      STD_TORCH_CHECK(total->rows == m.rows && total->cols == m.cols, "grad_x: expected x's shape");
      if (source) advise_huge_pages(*total);
      before.emplace(source ? *source : *grad_x, "source");
      STD_TORCH_CHECK(before->rows == m.rows && before->cols == m.cols, "source: expected x's shape");
    }
    return multiply_backward<T>(
        x, gradient, w, grad_x || need_sums, need_weight,
        [&](int64_t row, int64_t rows, int64_t c, int64_t cols, const float* grad_a, uint32_t* a, int64_t width,
            float* sum_d, float* sum_dx) {
          kernels_of<T>().mask_accumulate(grad_a, width, m.row(row) + c, m.ld, rows, cols, affine_x.from(c),
                                          before ? before->row(row) + c : nullptr, before ? before->ld : 0,
                                          total ? total->row(row) + c : nullptr, total ? total->ld : 0, a, width,
                                          sum_d, sum_dx);
        });
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_conv1x1));
  m.impl("cpu_bn_relu_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_conv1x1_backward));
}
