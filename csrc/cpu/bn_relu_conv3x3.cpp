// The ops of BN-ReLU-Conv3x3.
#include "bn_relu_conv3x3.h"

namespace densenet_fast {
namespace {

// out = conv3x3(relu(y), weight) + bias; y is x where there is nothing to normalise by, which has been rectified then
void bn_relu_conv3x3(Tensor x, std::optional<Tensor> mean, std::optional<Tensor> scale, std::optional<Tensor> shift,
                     Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> grid, Tensor out) {
  // [M, B], [B] each, [k, B, 3, 3], [k], [M, k]
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Matrix<T> result(out, "out");
    const Filters<T> filters(weight, m.cols);
    STD_TORCH_CHECK(result.rows == m.rows && result.cols == filters.out_channels, "out: expected [M, k]");
    const std::optional<Affine> a = optional_affine(mean, scale, shift, m.cols);
    conv3x3<T>(m, or_null(a), filters, vector(bias, filters.out_channels, "bias"), grid, result);
  });
}

// D = conv3x3_input_grad(grad, weight) * (y > 0):  out = source + scale * D,  grad_weight,  sum D,  sum D * (x - mean);
// the source may be out
Tensor bn_relu_conv3x3_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight,
                                std::vector<int64_t> grid, std::optional<Tensor> out, std::optional<Tensor> grad_weight,
                                std::optional<Tensor> source) {
  // [M, k], [M, B], [B] each, [k, B, 3, 3], [M, B], [k, B, 3, 3] float32, [M, B]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Filters<T> filters(weight, m.cols);
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == filters.out_channels, "grad: expected [M, k]");
    std::optional<FiltersGradient> dw;
    if (grad_weight) {
      STD_TORCH_CHECK(grad_weight->size(0) == g.cols && grad_weight->size(1) == m.cols,
                      "grad_weight: expected the weight's shape");
      dw.emplace(*grad_weight);
    }
    std::optional<Matrix<T>> result;
    if (out) {
      result.emplace(*out, "out");
      check_shape(*result, m, "out");
    }
    std::optional<Matrix<const T>> before;
    if (source) {
      before.emplace(*source, "source");
      STD_TORCH_CHECK(out && before->rows == m.rows && before->cols == m.cols, "source: expected x's shape, and out");
    }
    Tensor sums = out ? new_floats(x, {2, m.cols}) : nothing(x);
    conv3x3_backward<T>(g, m, affine(mean, scale, shift, m.cols), filters, grid,
                        {or_null(before), or_null(result), floats_of(sums)}, or_null(dw));
    return sums;
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv3x3", TORCH_BOX(&densenet_fast::bn_relu_conv3x3));
  m.impl("cpu_bn_relu_conv3x3_backward", TORCH_BOX(&densenet_fast::bn_relu_conv3x3_backward));
}
