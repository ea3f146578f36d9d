// BN-ReLU-Conv1x1, forward and backward: a row tile is normalised into scratch and multiplied while it is in cache.
#include "tiles.h"

namespace densenet_fast {
namespace {

constexpr int64_t kTileRows = 112;    // a multiple of the product's row blocks
constexpr int64_t kDepthSteps = 256;  // a panel of this depth stays in the first-level cache

// Z = relu((x - mean) * scale + shift) @ weight^T + bias, with the statistics of Z
std::tuple<Tensor, Tensor, Tensor> bn_relu_conv1x1(Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight,
                                                   std::optional<Tensor> bias, bool want_statistics) {
  // [M, C], [C] each, [B, C], [B]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels_of<T>();
    const Matrix<const T> m(x, "x"), w(weight, "weight");
    STD_TORCH_CHECK(w.cols == m.cols, "weight: expected ", m.cols, " columns, got ", w.cols);
    const Affine a = affine(mean, scale, shift, m.cols);
    const float* b = bias ? vector(*bias, w.rows, "bias") : nullptr;
    Tensor z = torch::stable::new_empty(x, {m.rows, w.rows});
    advise_huge_pages(z);
    const Matrix<T> out(z, "z");
    const Panels weights(w.rows, steps_of<T>(m.cols));
    weights.each([&](int64_t p) {
      kernel.pack(w.row(32 * p), 1, w.ld, m.cols, weights.valid(p), weights.width(p), weights.panel(p));
    });
    const Tiles tiles(m.rows, kTileRows, 16);
    TileStatistics result(tiles, want_statistics ? w.rows : 0);
    tiles.run([&](int64_t chunk) {
      const int64_t a_ld = std::min(weights.steps, kDepthSteps) + kSkew, z_ld = weights.padded();
      const auto tile_a = scratch<uint32_t>(tiles.largest() * a_ld);
      const auto tile_z = scratch<float>(tiles.largest() * z_ld);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        for (int64_t step = 0; step < weights.steps; step += kDepthSteps) {
          const int64_t steps = std::min(weights.steps - step, kDepthSteps), c = step * kPerWord<T>;
          const int64_t cols = std::min(m.cols - c, steps * kPerWord<T>);
          T* values = reinterpret_cast<T*>(tile_a.get());
          kernel.bn_relu(m.row(first) + c, m.ld, n, cols, {a.mean + c, a.scale + c, a.shift + c}, values,
                         a_ld * kPerWord<T>);
          for (int64_t r = 0; cols < steps * kPerWord<T> && r < n; ++r) values[r * a_ld * kPerWord<T> + cols] = T{};
          for (int64_t p = 0; p < weights.count; ++p) {
            const Operand panel = {weights.panel(p) + step * weights.width(p), 0, weights.width(p)};
            kernel.product({tile_a.get(), a_ld, 1}, panel, n, weights.width(p), steps, tile_z.get() + 32 * p, z_ld,
                           step > 0);
          }
        }
        kernel.store_rows(tile_z.get(), z_ld, n, w.rows, b, out.row(first), out.ld);
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
    const Kernels<T>& kernel = kernels_of<T>();
    const Matrix<const T> g(grad, "grad"), m(x, "x"), w(weight, "weight");
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == w.rows && w.cols == m.cols, "grad, x, weight: sizes do not match");
    const Affine a = affine(mean, scale, shift, m.cols);
    const bool need_d = grad_x.has_value() || need_sums;
    std::optional<Matrix<T>> total_grad;
    if (grad_x) total_grad.emplace(*grad_x, "grad_x");
    const int64_t depth = steps_of<T>(g.cols);
    const Panels weights(m.cols, depth);
    weights.each([&](int64_t p) {
      if (need_d) kernel.pack(w.data + 32 * p, w.ld, 1, g.cols, weights.valid(p), weights.width(p), weights.panel(p));
    });
    const Tiles tiles(m.rows, kTileRows, 16);
    std::vector<std::vector<float>> dw(tiles.chunks);
    std::vector<ColumnSums> sums(tiles.chunks);
    tiles.run([&](int64_t chunk) {
      const int64_t rows = tiles.largest(), row_steps = steps_of<T>(rows), g_ld = depth + kSkew;
      const auto tile_d = scratch<float>(rows * 32);
      const auto tile_a = scratch<uint32_t>(row_steps * 32);
      // the gradient as pairs along B, and along the rows
      const auto by_row = scratch<uint32_t>(kPerWord<T> > 1 ? rows * g_ld : 0);
      const auto by_column = scratch<uint32_t>(kPerWord<T> > 1 ? row_steps * g.cols : 0);
      if (need_weight) dw[chunk] = zeros(g.cols * weights.padded());
      sums[chunk].reset(m.cols);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        Operand left = {as_words(g.row(first)), g.ld, 1}, transposed = {as_words(g.row(first)), 1, g.ld};
        if constexpr (kPerWord<T> > 1) {
          if (g.cols % 2 == 0 && g.ld % 2 == 0) {
            left = {as_words(g.row(first)), g.ld / 2, 1};
          } else {
            for (int64_t r = 0; r < n; ++r) kernel.pack(g.row(first + r), 1, 0, g.cols, 1, 1, by_row.get() + r * g_ld);
            left = {by_row.get(), g_ld, 1};
          }
          kernel.pack(g.row(first), g.ld, 1, n, g.cols, g.cols, by_column.get());
          transposed = {by_column.get(), 1, g.cols};
        }
        sums[chunk].add([&](float* sum_d, float* sum_dx) {
          for (int64_t p = 0; p < weights.count; ++p) {
            const int64_t c = 32 * p, width = weights.width(p);
            if (need_d) {
              kernel.product(left, weights.operand(p), n, width, depth, tile_d.get(), width, false);
            }
            kernel.mask_accumulate(need_d ? tile_d.get() : nullptr, width, m.row(first) + c, m.ld, n, weights.valid(p),
                                   {a.mean + c, a.scale + c, a.shift + c},
                                   total_grad ? total_grad->row(first) + c : nullptr, total_grad ? total_grad->ld : 0,
                                   need_weight ? tile_a.get() : nullptr, width, sum_d + c, sum_dx + c);
            if (need_weight) {
              kernel.product(transposed, {tile_a.get(), 0, width}, g.cols, width, steps_of<T>(n),
                             dw[chunk].data() + c * g.cols, width, true);
            }
          }
        });
      }
    });
    return std::tuple<Tensor, Tensor>(need_weight ? from_panels(dw, weights, g.cols, x) : nothing(x),
                                      need_d ? total(sums, x) : nothing(x));
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_conv1x1));
  m.impl("cpu_bn_relu_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_conv1x1_backward));
}
