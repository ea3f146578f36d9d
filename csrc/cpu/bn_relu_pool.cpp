// The transition: BN-ReLU and a 2x2 mean, forward and backward.
#include "tiles.h"

namespace densenet_fast {
namespace {

// The rows of an image and of its 2x2 means; `grid` is (N, *spatial)
struct Pooling {
  int64_t batch, sizes[3], windows[3], pooled[3];
  int64_t inputs, outputs, window = 1;

  Pooling(const std::vector<int64_t>& grid, int64_t rows) : batch(grid.at(0)), inputs(batch), outputs(batch) {
    const int64_t dims = grid.size() - 1;
    STD_TORCH_CHECK(1 <= dims && dims <= 3, "grid: expected one to three spatial sizes");
    for (int64_t i = 0; i < 3; ++i) {
      const bool given = i < dims;
      sizes[i] = given ? grid[1 + i] : 1;
      windows[i] = given ? 2 : 1;
      pooled[i] = sizes[i] / windows[i];
      window *= windows[i];
      inputs *= sizes[i];
      outputs *= pooled[i];
    }
    STD_TORCH_CHECK(inputs == rows, "grid: expected the product ", rows, ", got ", inputs);
  }

  // The input rows of output row `row`
  void sources(int64_t row, int64_t* rows) const {
    const int64_t z = row % pooled[2], y = row / pooled[2] % pooled[1], x = row / (pooled[2] * pooled[1]) % pooled[0];
    const int64_t n = row / (pooled[2] * pooled[1] * pooled[0]);
    for (int64_t i = 0; i < windows[0]; ++i)
      for (int64_t j = 0; j < windows[1]; ++j)
        for (int64_t k = 0; k < windows[2]; ++k)
          *rows++ = ((n * sizes[0] + windows[0] * x + i) * sizes[1] + windows[1] * y + j) * sizes[2] + windows[2] * z + k;
  }

  bool drops_rows() const { return outputs * window != inputs; }
};

// Means of relu(y) over windows of 2; an odd last row or column is dropped
Tensor bn_relu_pool(Tensor x, Tensor mean, Tensor scale, Tensor shift, std::vector<int64_t> grid) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Affine a = affine(mean, scale, shift, m.cols);
    const Pooling pooling(grid, m.rows);
    Tensor out = torch::stable::new_empty(x, {pooling.outputs, m.cols});
    const Matrix<T> result(out, "out");
    Tiles(pooling.outputs, 5 * m.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      for (int64_t row = first; row < first + n; ++row) {
        int64_t sources[8];
        const T* rows[8];
        pooling.sources(row, sources);
        for (int64_t i = 0; i < pooling.window; ++i) rows[i] = m.row(sources[i]);
        kernels_of<T>().bn_relu_sum(rows, pooling.window, m.cols, a, 1.0f / pooling.window, result.row(row));
      }
    });
    return out;
  });
}

// From the gradient of the means: D, each mean's share of it where y > 0; scale * D [M, C], and (sum D, sum D * (x - mean))
std::tuple<Tensor, Tensor> bn_relu_pool_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift,
                                                 std::vector<int64_t> grid) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Affine a = affine(mean, scale, shift, m.cols);
    const Pooling pooling(grid, m.rows);
    STD_TORCH_CHECK(g.rows == pooling.outputs && g.cols == m.cols, "grad: expected the shape of the means");
    Tensor out = torch::stable::new_empty(x, {m.rows, m.cols});
    if (pooling.drops_rows()) torch::stable::zero_(out);
    const Matrix<T> result(out, "out");
    const Tiles tiles(pooling.outputs, 9 * m.cols * sizeof(T));
    std::vector<ColumnSums> sums(tiles.chunks);
    for (ColumnSums& chunk : sums) chunk.reset(m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      sums[tile / tiles.per_chunk].add([&](float* sum_d, float* sum_dx) {
        for (int64_t row = first; row < first + n; ++row) {
          int64_t sources[8];
          pooling.sources(row, sources);
          for (int64_t i = 0; i < pooling.window; ++i) {
            kernels_of<T>().mask_row(g.row(row), m.row(sources[i]), m.cols, a, 1.0f / pooling.window,
                                     result.row(sources[i]), sum_d, sum_dx);
          }
        }
      });
    });
    return std::tuple<Tensor, Tensor>(out, total(sums, x));
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_pool", TORCH_BOX(&densenet_fast::bn_relu_pool));
  m.impl("cpu_bn_relu_pool_backward", TORCH_BOX(&densenet_fast::bn_relu_pool_backward));
}
