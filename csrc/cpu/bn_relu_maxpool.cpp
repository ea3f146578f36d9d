// The stem: BN-ReLU and the maximum over windows of 3 at distance 2, padded by 1; forward and backward.
#include <tuple>

#include "results.h"

namespace densenet_fast {
namespace {

constexpr int64_t kTileLines = 32;

// Lines of the image and of the maxima; the other spatial dimensions are x and y, of size 1 where they are missing
struct Pooling {
  int64_t batch, sizes[2], pooled[2], width, pooled_width;
  int centre = 0;  // of a window along the missing dimensions: positions count from 0 along the given ones

  Pooling(const std::vector<int64_t>& grid, int64_t rows) : batch(grid.at(0)), width(grid.back()) {
    const int64_t dims = spatial_dims(grid, rows);
    for (int64_t i = 0; i < 2; ++i) {
      const bool given = i + dims >= 3;
      sizes[i] = given ? grid[i + dims - 2] : 1;
      pooled[i] = (sizes[i] + 1) / 2;
      if (!given) centre += i == 0 ? 9 : 3;
    }
    pooled_width = (width + 1) / 2;
  }

  int64_t lines() const { return batch * sizes[0] * sizes[1]; }
  int64_t outputs() const { return batch * pooled[0] * pooled[1]; }

  // f(line of pixels, its place) over those that an output line reads: u = 2 * o - 1 + i along x and y
  template <typename F>
  void window(int64_t output, F f) const {
    const int64_t y = output % pooled[1], x = output / pooled[1] % pooled[0], n = output / (pooled[1] * pooled[0]);
    for (int64_t i = x > 0 ? 0 : 1; i < 3 && 2 * x - 1 + i < sizes[0]; ++i)
      for (int64_t j = y > 0 ? 0 : 1; j < 3 && 2 * y - 1 + j < sizes[1]; ++j)
        f((n * sizes[0] + 2 * x - 1 + i) * sizes[1] + 2 * y - 1 + j, 9 * i + 3 * j - centre);
  }

  // f(output line, the pixels' place in it) over those that read a line of pixels: u / 2 rounded down and up
  template <typename F>
  void readers(int64_t line, F f) const {
    const int64_t y = line % sizes[1], x = line / sizes[1] % sizes[0], n = line / (sizes[1] * sizes[0]);
    for (int64_t p = x / 2; p <= (x + 1) / 2 && p < pooled[0]; ++p)
      for (int64_t q = y / 2; q <= (y + 1) / 2 && q < pooled[1]; ++q)
        f((n * pooled[0] + p) * pooled[1] + q, 9 * (x - 2 * p + 1) + 3 * (y - 2 * q + 1) - centre);
  }
};

// Maxima of relu(y) [M', C], with their statistics unless null, and their positions in their windows [M', C]
std::tuple<Tensor, Tensor> maxima(const Tensor& x, Affine affine, const std::vector<int64_t>& grid,
                                  const StatisticsOutput* statistics) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Pooling pooling(grid, m.rows);
    const int64_t pooled = pooling.outputs() * pooling.pooled_width;
    Tensor out = empty(x, {pooled, m.cols});
    Tensor argmax = empty(x, {pooled, m.cols}, ScalarType::Byte);
    const Matrix<T> result(out, "out");
    uint8_t* positions = static_cast<uint8_t*>(argmax.data_ptr());
    const Tiles tiles(pooling.outputs(), kTileLines, 1);
    TileStatistics partial(tiles, statistics ? m.cols : 0);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      for (int64_t output = first; output < first + n; ++output) {
        Lines<T> lines;
        pooling.window(output, [&](int64_t line, uint8_t place) {
          lines.data[lines.count] = m.row(line * pooling.width);
          lines.places[lines.count++] = place;
        });
        const int64_t row = output * pooling.pooled_width;
        pool_kernels_of<T>().bn_relu_max(lines, m.ld, pooling.width, m.cols, affine, result.row(row),
                                         positions + row * m.cols);
      }
      if (statistics)
        partial.add<T>(tile, result.readonly().from(first * pooling.pooled_width), n * pooling.pooled_width);
    });
    if (statistics) partial.combine(tiles, *statistics, pooling.pooled_width);
    return std::tuple<Tensor, Tensor>(out, argmax);
  });
}

// From the gradient of the maxima: D, the sum of those that a pixel is the maximum of, where y > 0; scale * D [M, C],
// and (sum D, sum D * (x - mean)). Each pixel gathers from the outputs that read it, so that no two threads write one.
std::tuple<Tensor, Tensor> maxima_backward(const Tensor& grad, const Tensor& argmax, const Tensor& x, Affine affine,
                                           const std::vector<int64_t>& grid) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Pooling pooling(grid, m.rows);
    STD_TORCH_CHECK(g.rows == pooling.outputs() * pooling.pooled_width && g.cols == m.cols,
                    "grad: expected the shape of the maxima");
    STD_TORCH_CHECK(argmax.dim() == 2 && argmax.size(0) == g.rows && argmax.size(1) == g.cols &&
                        argmax.is_contiguous() && argmax.scalar_type() == ScalarType::Byte,
                    "argmax: expected uint8 of the shape of the maxima, contiguous");
    const uint8_t* positions = static_cast<const uint8_t*>(argmax.data_ptr());
    Tensor out = empty(x, {m.rows, m.cols});
    const Matrix<T> result(out, "out");
    const Tiles tiles(pooling.lines(), kTileLines, 1);
    std::vector<ColumnSums> sums = column_sums(tiles.chunks, m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      for (int64_t line = first; line < first + n; ++line) {
        Readers<T> readers;
        pooling.readers(line, [&](int64_t output, uint8_t place) {
          readers.data[readers.count] = g.row(output * pooling.pooled_width);
          readers.argmaxes[readers.count] = positions + output * pooling.pooled_width * m.cols;
          readers.places[readers.count++] = place;
        });
        const int64_t row = line * pooling.width;
        sums[tile / tiles.per_chunk].add([&](GradientSums out) {
          pool_kernels_of<T>().mask_max(readers, g.ld, m.from(row), pooling.width, m.cols, affine, result.row(row),
                                        out);
        });
      }
    });
    return std::tuple<Tensor, Tensor>(out, total(sums, x));
  });
}

std::tuple<Tensor, Tensor> bn_relu_maxpool(Tensor x, Tensor mean, Tensor scale, Tensor shift, std::vector<int64_t> grid,
                                           std::optional<Tensor> out_mean, std::optional<Tensor> out_var,
                                           std::optional<Tensor> out_rstd, double eps) {
  // [M, C], [C] each, [C] each
  const int64_t cols = x.size(1);
  const auto statistics = optional_statistics(out_mean, out_var, out_rstd, eps, cols);
  return maxima(x, affine(mean, scale, shift, cols), grid, or_null(statistics));
}

std::tuple<Tensor, Tensor> bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor mean, Tensor scale,
                                                    Tensor shift, std::vector<int64_t> grid) {
  // [M', C] twice, [M, C], [C] each
  return maxima_backward(grad, argmax, x, affine(mean, scale, shift, x.size(1)), grid);
}

Norm norm_of(const std::vector<Tensor>& tensors, double eps, int64_t cols) {
  STD_TORCH_CHECK(tensors.size() == kStageTensors, "tensors: expected six, got ", tensors.size());
  return {tensors.data(), eps, cols};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_relu_maxpool_stage(Tensor x, std::optional<Tensor> x_mean,
                                                                                 std::optional<Tensor> x_var,
                                                                                 std::vector<Tensor> tensors,
                                                                                 double eps, std::vector<int64_t> grid,
                                                                                 bool return_statistics) {
  const int64_t cols = x.size(1), own_cols = return_statistics ? cols : 0;
  const Norm norm = norm_of(tensors, eps, cols);
  STD_TORCH_CHECK(x_mean.has_value() == x_var.has_value(), "x_mean: expected with x_var");
  Tensor mean = new_vector(x, cols), var = new_vector(x, cols);
  Tensor out_mean = new_vector(x, own_cols), out_var = new_vector(x, own_cols);
  std::vector<float> rstd(cols);
  if (x_mean) {
    std::copy_n(vector(*x_mean, cols, "x_mean"), cols, floats_of(mean));
    std::copy_n(vector(*x_var, cols, "x_var"), cols, floats_of(var));
  } else if (!norm.frozen()) {
    by_dtype(x, [&](auto zero) {
      column_statistics(Matrix<const decltype(zero)>(x, "x"), {floats_of(mean), floats_of(var), rstd.data(), 0});
    });
  }
  const Folded folded = norm.fold(floats_of(mean), floats_of(var));
  const StatisticsOutput statistics(floats_of(out_mean), floats_of(out_var), rstd.data(), 0);
  const auto [out, argmax] = maxima(x, folded.affine(), grid, return_statistics ? &statistics : nullptr);
  return {out, argmax, mean, var, out_mean, out_var};
}

std::tuple<Tensor, std::vector<Tensor>> bn_relu_maxpool_stage_backward(Tensor grad, Tensor argmax, Tensor x,
                                                                       Tensor mean, Tensor var,
                                                                       std::vector<Tensor> tensors, double eps,
                                                                       std::vector<int64_t> grid) {
  const int64_t cols = x.size(1);
  const Norm norm = norm_of(tensors, eps, cols);
  const Folded folded = norm.fold(vector(mean, cols, "mean"), vector(var, cols, "var"));
  auto [scaled, sums] = maxima_backward(grad, argmax, x, folded.affine(), grid);
  const Gradients gradients(tensors);
  std::vector<float> p = zeros(cols), q = zeros(cols);
  norm.collect(folded, floats_of(sums), gradients.all.data(), p.data(), q.data());
  if (!norm.frozen()) {
    by_dtype(x, [&](auto zero) {
      using T = decltype(zero);
      const Matrix<T> total(scaled, "scaled");
      Finalise<T>({x, "x"}, folded.mean, p.data(), q.data(), x.size(0)).apply(total.readonly(), total);
    });
  }
  return {scaled, gradients.trained};
}

namespace {

// Both with maps [N, C, *spatial]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> op_stage(Tensor x, std::optional<Tensor> x_mean,
                                                                    std::optional<Tensor> x_var,
                                                                    std::vector<Tensor> tensors, double eps,
                                                                    std::vector<int64_t> grid, bool return_statistics) {
  auto made = bn_relu_maxpool_stage(x, x_mean, x_var, tensors, eps, grid, return_statistics);
  for (size_t i = 1; i < grid.size(); ++i) grid[i] = (grid[i] + 1) / 2;
  std::get<0>(made) = image(std::get<0>(made), grid);
  return made;
}

std::tuple<Tensor, std::vector<Tensor>> op_stage_backward(Tensor grad, Tensor argmax, Tensor x, Tensor mean, Tensor var,
                                                          std::vector<Tensor> tensors, double eps,
                                                          std::vector<int64_t> grid) {
  auto made = bn_relu_maxpool_stage_backward(grad, argmax, x, mean, var, tensors, eps, grid);
  std::get<0>(made) = image(std::get<0>(made), grid);
  return made;
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_maxpool", TORCH_BOX(&densenet_fast::bn_relu_maxpool));
  m.impl("cpu_bn_relu_maxpool_backward", TORCH_BOX(&densenet_fast::bn_relu_maxpool_backward));
  m.impl("cpu_bn_relu_maxpool_stage", TORCH_BOX(&densenet_fast::op_stage));
  m.impl("cpu_bn_relu_maxpool_stage_backward", TORCH_BOX(&densenet_fast::op_stage_backward));
}
