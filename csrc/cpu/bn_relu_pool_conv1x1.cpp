// The transition: BN-ReLU, a mean over windows of 2 and a 1x1 convolution, forward and backward. Pooling and the
// convolution are linear and commute, so the pooling comes first, in the tile that is about to be multiplied.
#include "inference.h"
#include "readers.h"
#include "shares.h"

namespace densenet_fast {
namespace {

// The rows of an image and of its 2x2 means; `grid` is (N, *spatial)
struct Pooling {
  int64_t batch, sizes[3], windows[3], pooled[3];
  int64_t inputs, outputs, window = 1;

  Pooling(const std::vector<int64_t>& grid, int64_t rows) : batch(grid.at(0)), inputs(rows), outputs(batch) {
    const int64_t dims = spatial_dims(grid, rows);
    for (int64_t i = 0; i < 3; ++i) {
      const bool given = i < dims;
      sizes[i] = given ? grid[1 + i] : 1;
      windows[i] = given ? 2 : 1;
      pooled[i] = sizes[i] / windows[i];
      window *= windows[i];
      outputs *= pooled[i];
    }
  }

  // Pointers to the rows of m that each of `n` output rows is the mean of
  template <typename T>
  std::vector<T*> sources(const Matrix<T>& m, int64_t first, int64_t n) const {
    std::vector<T*> pointers;
    pointers.reserve(n * window);
    int64_t rows[8];
    for (int64_t row = first; row < first + n; ++row) {
      sources(row, rows);
      for (int64_t i = 0; i < window; ++i) pointers.push_back(m.row(rows[i]));
    }
    return pointers;
  }

  void sources(int64_t row, int64_t* rows) const {
    const int64_t z = row % pooled[2], y = row / pooled[2] % pooled[1], x = row / (pooled[2] * pooled[1]) % pooled[0];
    const int64_t n = row / (pooled[2] * pooled[1] * pooled[0]);
    for (int64_t i = 0; i < windows[0]; ++i)
      for (int64_t j = 0; j < windows[1]; ++j)
        for (int64_t k = 0; k < windows[2]; ++k)
          *rows++ =
              ((n * sizes[0] + windows[0] * x + i) * sizes[1] + windows[1] * y + j) * sizes[2] + windows[2] * z + k;
  }

  bool drops_rows() const { return outputs * window != inputs; }
};

// Means of relu(y), for products.h
template <typename T>
auto pooled(const Matrix<const T>& x, Affine affine, const Pooling& pooling) {
  return [=](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<T> values, T* rest) {
    const auto sources = pooling.sources(x, row, rows);
    kernels_of<T>().bn_relu_mean({sources.data(), c, pooling.window}, rows, cols, affine.from(c), values, rest);
  };
}

template <typename T>
constexpr bool kExact = sizeof(T) < sizeof(float);  // the means' rounding is multiplied too

}  // namespace

Tensor transition(const Tensor& x, Affine affine, const Tensor& weight, const float* bias,
                  const std::vector<int64_t>& grid, const StatisticsOutput* statistics) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Weight<T> w(weight, m.cols);
    const Pooling pooling(grid, m.rows);
    Tensor out = empty(x, {pooling.outputs, w.rows});
    multiply_described<T>(w, bias, nullptr, Matrix<T>(out, "out"), statistics, kExact<T>, pooling.window,
                          pooled<T>(m, affine, pooling));
    return out;
  });
}

std::tuple<Tensor, Tensor> transition_backward(const Tensor& grad, const Tensor& x, Affine affine, const Tensor& weight,
                                               const std::vector<int64_t>& grid, bool need_input, float* grad_weight) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Weight<T> w(weight);
    const Pooling pooling(grid, m.rows);
    STD_TORCH_CHECK(g.rows == pooling.outputs && g.cols == w.rows && w.cols == m.cols,
                    "grad, x, weight: sizes do not match");
    Tensor scaled = empty(x, {need_input ? m.rows : 0, m.cols});
    const Matrix<T> result(scaled, "scaled");
    advise_huge_pages(result);
    if (pooling.drops_rows()) torch::stable::zero_(scaled);
    Tensor sums = need_input ? new_floats(x, {2, w.cols}) : nothing(x);
    multiply_backward<T>({g, {}}, w, grad_weight, need_input ? floats_of(sums) : nullptr,
                         [&](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<const float> grad_a, PanelRows a,
                             GradientSums own) {
                           const auto sources = pooling.sources(m, row, rows);
                           const auto results = need_input ? pooling.sources(result, row, rows) : std::vector<T*>();
                           kernels_of<T>().mask_windows(grad_a, {sources.data(), c, pooling.window}, rows, cols,
                                                        affine.from(c), results.data(), a, own);
                         });
    return std::tuple<Tensor, Tensor>(scaled, sums);
  });
}

namespace {

Tensor bn_relu_pool_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight,
                            std::optional<Tensor> bias, std::vector<int64_t> grid, std::optional<Tensor> out_mean,
                            std::optional<Tensor> out_var, std::optional<Tensor> out_rstd, double eps) {
  // [M, C], [C] each, [C', C], [C'], [C'] each
  const int64_t out_cols = weight.size(0);
  const auto statistics = optional_statistics(out_mean, out_var, out_rstd, eps, out_cols);
  return transition(x, affine(mean, scale, shift, x.size(1)), weight, vector(bias, out_cols, "bias"), grid,
                    or_null(statistics));
}

// The same by running statistics, without a bias
void bn_relu_pool_conv1x1_inference(Tensor x, std::vector<Tensor> tensors, double eps, std::vector<int64_t> grid,
                                    Tensor out) {  // [M, C], [M', C']
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    STD_TORCH_CHECK(tensors.size() == kNormTensors + 1, "tensors: expected five");
    const FrozenNorm norm(tensors.data(), eps, m.cols);
    const Weight<T> w(tensors[kNormTensors], m.cols);
    const Pooling pooling(grid, m.rows);
    const Matrix<T> result(out, "out");
    STD_TORCH_CHECK(result.rows == pooling.outputs && result.cols == w.rows, "out: expected [", pooling.outputs, ", ",
                    w.rows, "]");
    const int64_t tile = std::min(pooling.outputs, kTileRows);
    const Shares shares(pooling.outputs, kTileRows, w.rows, kPackCost / pooling.window);
    std::vector<std::optional<ProductScratch<T>>> own(shares.count());
    multiply_in_shares<T>(
        shares, w, nullptr, nullptr, result, kExact<T>,
        [&](int64_t share) -> ProductScratch<T>& { return own[share].emplace(tile, w.rows, w.cols, kExact<T>); },
        pooled<T>(m, norm.affine(), pooling));
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_pool_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale,
                                                                 Tensor shift, Tensor weight, std::vector<int64_t> grid,
                                                                 bool need_input, bool need_weight) {
  // [M', C'], [M, C], [C] each, [C', C]
  Tensor grad_weight = need_weight ? new_floats(x, {weight.size(0), weight.size(1)}) : nothing(x);
  const auto [scaled, sums] = transition_backward(grad, x, affine(mean, scale, shift, x.size(1)), weight, grid,
                                                  need_input, need_weight ? floats_of(grad_weight) : nullptr);
  return {scaled, grad_weight, sums};
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_pool_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_pool_conv1x1));
  m.impl("cpu_bn_relu_pool_conv1x1_inference", TORCH_BOX(&densenet_fast::bn_relu_pool_conv1x1_inference));
  m.impl("cpu_bn_relu_pool_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_pool_conv1x1_backward));
}
