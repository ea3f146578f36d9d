// What is summed over the rows: the statistics of columns, the sums of a backward pass, and what the gradient of a
// column owes to its statistics. Tiles are summed by themselves and combined in their order.
//
// Example:
//
//   const Matrix<const float> m(x, "x");
//   column_statistics(m, {mean, var, rstd, 1e-5, m.cols});  // over all rows; tensors [cols] each
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "tiles.h"

namespace densenet_fast {

// (sum D, sum D * (x - mean)) of one chunk of tiles: each tile's by itself, then added in double, so that rounding does
// not grow with the number of rows
struct ColumnSums {
  int64_t cols = 0;
  std::vector<double> sums;
  std::vector<float> tile;

  void reset(int64_t columns) {
    cols = columns;
    sums.assign(2 * cols, 0.0);
  }

  // f(sums) adds a tile's to zeros
  template <typename F>
  void add(F f) {
    tile.assign(2 * cols, 0.0f);
    f(GradientSums{tile.data(), tile.data() + cols});
    for (int64_t i = 0; i < 2 * cols; ++i) sums[i] += tile[i];
  }
};

inline std::vector<ColumnSums> column_sums(int64_t chunks, int64_t cols) {
  std::vector<ColumnSums> sums(chunks);
  for (ColumnSums& chunk : sums) chunk.reset(cols);
  return sums;
}

// Where the gradient of what a convolution reads goes, D = (its product's) * (y > 0)
template <typename T>
struct InputGradient {
  const Matrix<const T>* source;  // [M, C], or null: zero
  const Matrix<T>* out;           // [M, C] = source + scale * D, or null: not asked for
  float* sums;                    // [2, C] = (sum D, sum D * (x - mean)), or null
};

// Where statistics go: mean, biased variance and rstd = 1 / sqrt(var + eps), [cols] each
struct StatisticsOutput {
  float *mean, *var, *rstd, eps;

  StatisticsOutput(float* mean, float* var, float* rstd, float eps) : mean(mean), var(var), rstd(rstd), eps(eps) {}

  StatisticsOutput(const Tensor& mean, const Tensor& var, const Tensor& rstd, double eps, int64_t cols)
      : mean(output(mean, cols, "mean")), var(output(var, cols, "var")), rstd(output(rstd, cols, "rstd")), eps(eps) {}
};

inline std::optional<StatisticsOutput> optional_statistics(const std::optional<Tensor>& mean,
                                                           const std::optional<Tensor>& var,
                                                           const std::optional<Tensor>& rstd, double eps,
                                                           int64_t cols) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value() && mean.has_value() == rstd.has_value(),
                  "out_mean: expected with out_var and out_rstd");
  return mean ? std::optional(StatisticsOutput(*mean, *var, *rstd, eps, cols)) : std::nullopt;
}

// Column statistics per tile, combined pairwise in the order of the tiles (Chan, Golub and LeVeque 1983)
struct TileStatistics {
  int64_t cols;
  std::vector<double> means, m2s;

  TileStatistics(const Tiles& tiles, int64_t cols)
      : cols(cols), means(tiles.count() * cols), m2s(tiles.count() * cols) {}

  template <typename T>
  void add(int64_t tile, Rows<const T> x, int64_t rows) {
    kernels_of<T>().statistics(x, rows, cols, &means[tile * cols], &m2s[tile * cols]);
  }

  // Of tiles of lines of `width` rows each
  void combine(const Tiles& tiles, const StatisticsOutput& out, int64_t width = 1) const {
    std::vector<double> centre(cols), m2(cols);
    double count = 0;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const double n = width * (tiles.begin(tile + 1) - tiles.begin(tile));
      if (n == 0) continue;
      const double share = n / (count + n), weight = count * share;
      const double *tile_means = &means[tile * cols], *tile_m2s = &m2s[tile * cols];
      for (int64_t c = 0; c < cols; ++c) {
        const double delta = tile_means[c] - centre[c];
        m2[c] += tile_m2s[c] + delta * delta * weight;
        centre[c] += delta * share;
      }
      count += n;
    }
    for (int64_t c = 0; c < cols; ++c) {
      out.mean[c] = centre[c];
      out.var[c] = m2[c] / count;
      out.rstd[c] = 1.0f / std::sqrt(out.var[c] + out.eps);
    }
  }
};

template <typename T>
void column_statistics(const Matrix<const T>& m, const StatisticsOutput& out) {
  const Tiles tiles(m.rows, m.cols * sizeof(T));
  TileStatistics result(tiles, m.cols);
  tiles.each([&](int64_t tile, int64_t first, int64_t n) { result.add(tile, m.from(first), n); });
  result.combine(tiles, out);
}

// Sums the chunks' accumulators in their order: [2, cols], whose rows are `ld` apart
inline void total(const ColumnSums* parts, int64_t chunks, float* sums, int64_t ld) {
  const int64_t cols = parts[0].cols;
  for (int64_t i = 0; i < 2 * cols; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk].sums[i];
    sums[i / cols * ld + i % cols] = sum;
  }
}

inline void total(const std::vector<ColumnSums>& parts, float* sums) {
  total(parts.data(), parts.size(), sums, parts[0].cols);
}

inline Tensor total(const std::vector<ColumnSums>& parts, const Tensor& like) {
  Tensor sums = new_floats(like, {2, parts[0].cols});
  total(parts, floats_of(sums));
  return sums;
}

// (1): grad + (p + 2 * q * (x - mean)) / count, what reaches x through its batch statistics included
template <typename T>
struct Finalise {
  Matrix<const T> x;
  const float* mean;
  std::vector<float> constant, slope;

  Finalise(const Matrix<const T>& x, const float* mean, const float* p, const float* q, double count)
      : x(x), mean(mean), constant(x.cols), slope(x.cols) {
    for (int64_t c = 0; c < x.cols; ++c) {
      constant[c] = p[c] / count;
      slope[c] = 2 * q[c] / count;
    }
  }

  Finalise(const Tensor& x, const Tensor& mean, const Tensor& p, const Tensor& q, double count)
      : Finalise(Matrix<const T>(x, "x"), vector(mean, x.size(1), "mean"), vector(p, x.size(1), "p"),
                 vector(q, x.size(1), "q"), count) {}

  void check(const Matrix<const T>& grad) const { check_shape(grad, x, "grad"); }

  // On all rows; out may be grad
  void apply(const Matrix<const T>& grad, const Matrix<T>& out) const {
    Tiles(grad.rows, 3 * grad.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      apply(grad, first, n, out.from(first));
    });
  }

  // `rows` rows from `first` on
  void apply(const Matrix<const T>& grad, int64_t first, int64_t rows, Rows<T> out) const {
    kernels_of<T>().finalise(grad.from(first), x.from(first), rows, x.cols, mean, constant.data(), slope.data(), out);
  }
};

}  // namespace densenet_fast
