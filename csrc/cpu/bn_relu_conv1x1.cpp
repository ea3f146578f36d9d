// BN-ReLU-Conv1x1, forward and backward.
#include "tiles.h"

namespace densenet_fast {
namespace {

// Z = relu((x - mean) * scale + shift) @ weight^T, with the statistics of Z
std::tuple<Tensor, Tensor, Tensor> bn_relu_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight,
                                                   bool want_statistics) {  // [M, C], [C] each, [B, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x"), w(weight, "weight");
    STD_TORCH_CHECK(w.cols == m.cols, "weight: expected ", m.cols, " columns, got ", w.cols);
    const Affine a = affine(mean, scale, shift, m.cols);
    Tensor z = torch::stable::new_empty(x, {m.rows, w.rows});
    const Matrix<T> out(z, "z");
    const Tiles tiles(m.rows, (m.cols + w.rows) * sizeof(T));
    TileStatistics result(tiles, want_statistics ? w.rows : 0);
    tiles.run([&](int64_t chunk) {
      const auto tile_a = scratch<T>(tiles.largest() * m.cols);
      const Tensor transposed = blob(w.data, w.cols, w.rows, 1, w.ld);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        kernels_of<T>().bn_relu(m.row(first), m.ld, n, m.cols, a, tile_a.get());
        multiply(blob(tile_a.get(), n, m.cols, m.cols, 1), transposed, blob(out.row(first), n, w.rows, out.ld, 1));
        if (want_statistics) result.add(tile, out.row(first), out.ld, n);
      }
    });
    auto [z_mean, z_var] = want_statistics ? result.combined(tiles, x) : std::tuple(nothing(x), nothing(x));
    return std::tuple<Tensor, Tensor, Tensor>(z, z_mean, z_var);
  });
}

// D = (grad @ weight) * (y > 0):  grad_x += scale * D,  dW = grad^T @ relu(y),  sum D,  sum D * (x - mean)
std::tuple<Tensor, Tensor> bn_relu_conv1x1_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift,
                                                    Tensor weight, std::optional<Tensor> grad_x, bool need_weight,
                                                    bool need_sums) {
  // [M, B], [M, C], [C] each, [B, C], [M, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x"), w(weight, "weight");
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == w.rows && w.cols == m.cols, "grad, x, weight: sizes do not match");
    const Affine a = affine(mean, scale, shift, m.cols);
    const bool need_d = grad_x.has_value() || need_sums;
    std::optional<Matrix<T>> accumulated;
    if (grad_x) accumulated.emplace(*grad_x, "grad_x");
    const Tiles tiles(m.rows, (2 * m.cols + g.cols) * sizeof(T));
    const size_t chunks = tiles.chunks;
    std::vector<std::vector<float>> dw(chunks);
    std::vector<ColumnSums> sums(chunks);
    tiles.run([&](int64_t chunk) {
      const auto tile_d = scratch<T>(need_d ? tiles.largest() * m.cols : 0);
      const auto tile_a = scratch<T>(need_weight ? tiles.largest() * m.cols : 0);
      const bool is_float = std::is_same_v<T, float>;
      const auto product = scratch<T>(need_weight && !is_float ? w.rows * w.cols : 0);
      if (need_weight) dw[chunk] = zeros(w.rows * w.cols);
      sums[chunk].reset(m.cols);
      const Tensor weights = blob(w.data, w.rows, w.cols, w.ld, 1);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        T* relu = need_weight ? tile_a.get() : nullptr;
        if (need_d) {
          multiply(blob(g.row(first), n, g.cols, g.ld, 1), weights, blob(tile_d.get(), n, m.cols, m.cols, 1));
          sums[chunk].add([&](float* sum_d, float* sum_dx) {
            kernels_of<T>().mask_accumulate(tile_d.get(), m.row(first), m.ld, n, m.cols, a,
                                            accumulated ? accumulated->row(first) : nullptr,
                                            accumulated ? accumulated->ld : 0, relu, sum_d, sum_dx);
          });
        } else if (need_weight) {
          kernels_of<T>().bn_relu(m.row(first), m.ld, n, m.cols, a, relu);
        }
        if (!need_weight) continue;
        const Tensor transposed = blob(g.row(first), g.cols, n, 1, g.ld);
        const Tensor activation = blob(relu, n, m.cols, m.cols, 1);
        if constexpr (is_float) {
          const Tensor sum = blob(dw[chunk].data(), w.rows, w.cols, w.cols, 1);
          STABLE_TORCH_ERROR_CODE_CHECK(
              aoti_torch_cpu_addmm_out(sum.get(), sum.get(), transposed.get(), activation.get(), 1.0, 1.0));
        } else {
          multiply(transposed, activation, blob(product.get(), w.rows, w.cols, w.cols, 1));
          kernels_of<T>().add(product.get(), w.rows * w.cols, dw[chunk].data());
        }
      }
    });
    return std::tuple<Tensor, Tensor>(need_weight ? total(dw, {w.rows, w.cols}, x) : nothing(x),
                                      need_d ? total(sums, x) : nothing(x));
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_conv1x1));
  m.impl("cpu_bn_relu_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_conv1x1_backward));
}
