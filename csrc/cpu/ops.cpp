// The ops of the CPU backend: checks, allocation, and the division of the rows among torch's threads and into tiles that
// stay in cache.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace densenet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
constexpr ScalarType kDtype<bf16> = ScalarType::BFloat16;

template <typename T>
const Kernels<T>& kernels_of();
template <>
const Kernels<float>& kernels_of() {
  return kernels().f32;
}
template <>
const Kernels<bf16>& kernels_of() {
  return kernels().b16;
}

// A matrix with adjacent columns, [rows, cols] and `ld` elements from row to row
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols, ld;

  Matrix(const Tensor& t, const char* name) : rows(t.size(0)), cols(t.size(1)), ld(t.stride(0)) {
    STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || cols <= 1), name, ": expected a matrix of adjacent columns");
    STD_TORCH_CHECK(t.scalar_type() == kDtype<std::remove_const_t<T>>, name, ": dtype unlike the others'");
    data = static_cast<T*>(t.data_ptr());
  }

  T* row(int64_t r) const { return data + r * ld; }
};

const float* vector(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  ": expected ", size, " contiguous float32 values");
  return static_cast<const float*>(t.data_ptr());
}

Affine affine(const Tensor& mean, const Tensor& scale, const Tensor& shift, int64_t cols) {
  return {vector(mean, cols, "mean"), vector(scale, cols, "scale"), vector(shift, cols, "shift")};
}

template <typename T>
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  T* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  return {memory, &std::free};
}

std::vector<float> zeros(int64_t count) { return std::vector<float>(count, 0.0f); }

// `rows` divided evenly into one chunk per thread, and each chunk into tiles whose scratch stays in the core's cache. The
// division, and with it every rounding, depends on nothing but the shape and the number of threads.
struct Tiles {
  int64_t rows, chunks, per_chunk;

  Tiles(int64_t rows, int64_t scratch_bytes_per_row) : rows(rows) {
    constexpr int64_t kScratchBytes = 384 << 10;
    const int64_t tile = std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(scratch_bytes_per_row, 1), 32, 1024);
    const int64_t wanted = std::max<int64_t>((rows + tile - 1) / tile, 1);
    chunks = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(rows / 16, 1));
    per_chunk = (wanted + chunks - 1) / chunks;
  }

  int64_t count() const { return chunks * per_chunk; }
  int64_t begin(int64_t tile) const { return rows * tile / count(); }
  int64_t largest() const { return rows / count() + 1; }

  // f(chunk) in parallel; a chunk's tiles are chunk * per_chunk ... (chunk + 1) * per_chunk
  template <typename F>
  void run(F f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  }

  // f(tile, first row, rows) in parallel
  template <typename F>
  void each(F f) const {
    run([&](int64_t chunk) {
      for (int64_t tile = chunk * per_chunk; tile < (chunk + 1) * per_chunk; ++tile) {
        const int64_t first = begin(tile), n = begin(tile + 1) - first;
        if (n > 0) f(tile, first, n);
      }
    });
  }
};

// (sum D, sum D * (x - mean)) of one chunk of tiles: each tile's by itself, then added, so that rounding does not grow with
// the number of rows
struct ColumnSums {
  int64_t cols = 0;
  std::vector<float> sums, tile;

  void reset(int64_t columns) {
    cols = columns;
    sums = zeros(2 * cols);
  }

  // f(sum_d, sum_dx) adds a tile's sums to zeros
  template <typename F>
  void add(F f) {
    tile.assign(2 * cols, 0.0f);
    f(tile.data(), tile.data() + cols);
    kernels().f32.add(tile.data(), 2 * cols, sums.data());
  }
};

// Column statistics per tile, combined pairwise in the order of the tiles (Chan, Golub and LeVeque 1983)
struct TileStatistics {
  int64_t cols;
  std::vector<float> means, m2s;

  TileStatistics(const Tiles& tiles, int64_t cols)
      : cols(cols), means(zeros(tiles.count() * cols)), m2s(zeros(tiles.count() * cols)) {}

  template <typename T>
  void add(int64_t tile, const T* x, int64_t ld, int64_t rows) {
    kernels_of<T>().statistics(x, ld, rows, cols, &means[tile * cols], &m2s[tile * cols]);
  }

  std::tuple<Tensor, Tensor> combined(const Tiles& tiles, const Tensor& like) const {
    Tensor mean = torch::stable::new_empty(like, {cols}, ScalarType::Float);
    Tensor var = torch::stable::new_empty(like, {cols}, ScalarType::Float);
    float* mean_data = static_cast<float*>(mean.data_ptr());
    float* var_data = static_cast<float*>(var.data_ptr());
    for (int64_t c = 0; c < cols; ++c) {
      double count = 0, centre = 0, m2 = 0;
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        const double n = tiles.begin(tile + 1) - tiles.begin(tile);
        if (n == 0) continue;
        const double delta = means[tile * cols + c] - centre, total = count + n;
        m2 += m2s[tile * cols + c] + delta * delta * count * n / total;
        centre += delta * n / total;
        count = total;
      }
      mean_data[c] = centre;
      var_data[c] = m2 / count;
    }
    return {mean, var};
  }
};

template <typename T>
Tensor blob(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return torch::stable::from_blob(const_cast<T*>(data), {rows, cols}, {row_stride, col_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kDtype<T>);
}

// out = a @ b; a thread of torch's pool computes it alone
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Sums the chunks' accumulators in their order
Tensor total(const std::vector<std::vector<float>>& parts, torch::headeronly::IntHeaderOnlyArrayRef size,
             const Tensor& like) {
  Tensor sum = torch::stable::new_empty(like, size, ScalarType::Float);
  float* data = static_cast<float*>(sum.data_ptr());
  std::copy(parts[0].begin(), parts[0].end(), data);
  for (size_t i = 1; i < parts.size(); ++i) kernels().f32.add(parts[i].data(), parts[i].size(), data);
  return sum;
}

Tensor total(const std::vector<ColumnSums>& parts, const Tensor& like) {  // [2, cols]
  std::vector<std::vector<float>> sums;
  for (const ColumnSums& part : parts) sums.push_back(part.sums);
  return total(sums, {2, parts[0].cols}, like);
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

template <typename F>
auto by_dtype(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "expected float32 or bfloat16");
  return x.scalar_type() == ScalarType::Float ? f(float()) : f(bf16());
}

std::string capability() { return kernels().name; }

std::tuple<Tensor, Tensor> statistics(Tensor x) {  // [M, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Tiles tiles(m.rows, m.cols * sizeof(T));
    TileStatistics result(tiles, m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) { result.add(tile, m.row(first), m.ld, n); });
    return result.combined(tiles, x);
  });
}

Tensor bn_relu(Tensor x, Tensor mean, Tensor scale, Tensor shift) {  // [M, C], [C] each
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Affine a = affine(mean, scale, shift, m.cols);
    Tensor out = torch::stable::new_empty(x, {m.rows, m.cols});
    const Matrix<T> result(out, "out");
    Tiles(m.rows, m.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      kernels_of<T>().bn_relu(m.row(first), m.ld, n, m.cols, a, result.row(first));
    });
    return out;
  });
}

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

// D = grad * (y > 0): grad = scale * D in place, sum D, sum D * (x - mean)
Tensor mask(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift) {  // [M, C], [C] each
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> g(grad, "grad");
    const Matrix<const T> m(x, "x");
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == m.cols && g.ld == g.cols, "grad: expected x's shape, contiguous");
    const Affine a = affine(mean, scale, shift, m.cols);
    const Tiles tiles(m.rows, 2 * m.cols * sizeof(T));
    std::vector<ColumnSums> sums(tiles.chunks);
    for (ColumnSums& chunk : sums) chunk.reset(m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      sums[tile / tiles.per_chunk].add([&](float* sum_d, float* sum_dx) {
        kernels_of<T>().mask(g.row(first), m.row(first), m.ld, n, m.cols, a, sum_d, sum_dx);
      });
    });
    return total(sums, x);
  });
}

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

// grad + (p + 2 * q * (x - mean)) / count
Tensor finalise(Tensor grad, Tensor x, Tensor mean, Tensor p, Tensor q, double count) {  // [M, n] each, [n] each
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == m.cols, "grad: expected x's shape");
    const float *centre = vector(mean, m.cols, "mean"), *by_mean = vector(p, m.cols, "p"),
                *by_variance = vector(q, m.cols, "q");
    std::vector<float> constant(m.cols), slope(m.cols);
    for (int64_t c = 0; c < m.cols; ++c) {
      constant[c] = by_mean[c] / count;
      slope[c] = 2 * by_variance[c] / count;
    }
    Tensor out = torch::stable::new_empty(x, {m.rows, m.cols});
    const Matrix<T> result(out, "out");
    Tiles(m.rows, 3 * m.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      kernels_of<T>().finalise(g.row(first), g.ld, m.row(first), m.ld, n, m.cols, centre, constant.data(),
                               slope.data(), result.row(first));
    });
    return out;
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&densenet_fast::capability));
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_statistics", TORCH_BOX(&densenet_fast::statistics));
  m.impl("cpu_bn_relu", TORCH_BOX(&densenet_fast::bn_relu));
  m.impl("cpu_bn_relu_conv1x1", TORCH_BOX(&densenet_fast::bn_relu_conv1x1));
  m.impl("cpu_bn_relu_conv1x1_backward", TORCH_BOX(&densenet_fast::bn_relu_conv1x1_backward));
  m.impl("cpu_mask_", TORCH_BOX(&densenet_fast::mask));
  m.impl("cpu_bn_relu_pool", TORCH_BOX(&densenet_fast::bn_relu_pool));
  m.impl("cpu_bn_relu_pool_backward", TORCH_BOX(&densenet_fast::bn_relu_pool_backward));
  m.impl("cpu_finalise", TORCH_BOX(&densenet_fast::finalise));
}
