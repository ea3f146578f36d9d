// BN-ReLU-Conv3x3 of two-dimensional images, forward and backward, by minimal filtering (winograd.h): a batch of 2x2 tiles is
// normalised and transformed into scratch, multiplied, and transformed back while it is in cache.
#include "tiles.h"

namespace densenet_fast {
namespace {

// The 2x2 tiles of all images, in order; those at the lower and right border may reach outside
struct ImageTiles {
  int64_t batch, height, width, down, across;

  ImageTiles(const std::vector<int64_t>& grid, int64_t rows) {
    STD_TORCH_CHECK(grid.size() == 3 && grid[0] * grid[1] * grid[2] == rows,
                    "grid: expected two spatial sizes and the product ", rows);
    batch = grid[0];
    height = grid[1];
    width = grid[2];
    down = (height + 1) / 2;
    across = (width + 1) / 2;
  }

  int64_t count() const { return batch * down * across; }

  // Pointers to the size x size pixels of tiles first ... first + n that begin `border` above and left; null outside
  template <typename T>
  void pixels(const Matrix<T>& m, int64_t first, int64_t n, int64_t size, int64_t border, T** out) const {
    for (int64_t t = first; t < first + n; ++t) {
      const int64_t image = t / (down * across), y = t / across % down * 2 - border, x = t % across * 2 - border;
      for (int64_t i = y; i < y + size; ++i) {
        for (int64_t j = x; j < x + size; ++j) {
          const bool inside = 0 <= i && i < height && 0 <= j && j < width;
          *out++ = inside ? m.row((image * height + i) * width + j) : nullptr;
        }
      }
    }
  }
};

// The pixels of a batch of tiles
template <typename T>
struct Pixels {
  int64_t size, border;
  std::vector<T*> pointers;

  Pixels(int64_t size, int64_t border, int64_t tiles) : size(size), border(border), pointers(size * size * tiles) {}

  T* const* of(const ImageTiles& tiles, const Matrix<T>& m, int64_t first, int64_t n) {
    pointers.resize(size * size * n);
    tiles.pixels(m, first, n, size, border, pointers.data());
    return pointers.data();
  }
};

// Fetches part `part` of `parts` of the pixels of the next tiles, while a product keeps the processor busy
template <typename T>
void prefetch(const std::vector<T*>& pixels, int64_t part, int64_t parts, int64_t offset, int64_t cols) {
  const int64_t count = pixels.size();
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    for (int64_t c = 0; pixels[i] && c < cols; c += 64 / sizeof(T)) __builtin_prefetch(pixels[i] + offset + c, 0, 2);
  }
}

// The 16 values of as many as `tiles` tiles; what no tile is stored to stays zero
template <typename T>
struct Transformed {
  int64_t words, position;  // in a row, from position to position
  bool paired;
  std::unique_ptr<T[], decltype(&std::free)> data;

  Transformed(int64_t tiles, int64_t cols, bool paired)
      : words((paired ? cols : steps_of<T>(cols)) + (cols > 32 ? kSkew : 0)),
        position((paired ? steps_of<T>(tiles) : tiles) * words),
        paired(paired),
        data(scratch<T>(16 * position * kPerWord<T>)) {
    std::fill_n(data.get(), 16 * position * kPerWord<T>, T{});
  }

  TransformedTiles<T> tiles() const { return {data.get(), position * kPerWord<T>, words * kPerWord<T>, paired}; }

  const uint32_t* at(int64_t i) const { return as_words(data.get()) + i * position; }
};

constexpr int64_t kForwardTiles = 28, kBackwardTiles = 84;
constexpr int64_t kDepth = 128;  // words that are summed at a time: the rounding of longer sums would show

// [k, B, 3, 3], its taps evenly spaced: contiguous or channels last
template <typename T>
struct Filters {
  int64_t out_channels, in_channels;
  FilterStrides strides;
  T* data;

  Filters(const Tensor& weight, int64_t cols, const char* name)
      : out_channels(weight.size(0)), in_channels(cols), strides{weight.stride(1), weight.stride(0), weight.stride(3)} {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == cols && weight.size(2) == 3 && weight.size(3) == 3 &&
                        weight.stride(2) == 3 * weight.stride(3),
                    name, ": expected [k, ", cols, ", 3, 3], contiguous or channels last");
    STD_TORCH_CHECK(weight.scalar_type() == kDtype<std::remove_const_t<T>>, name, ": dtype unlike the others'");
    data = static_cast<T*>(weight.data_ptr());
  }
};

// out = conv3x3(relu(y), weight) + bias; y is x where there is nothing to normalise by, which has been rectified then
void bn_relu_conv3x3(Tensor x, std::optional<Tensor> mean, std::optional<Tensor> scale, std::optional<Tensor> shift,
                     Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> grid, Tensor out) {  // [M, B], [B] each, [k, B, 3, 3], [k], [M, k]
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels_of<T>();
    const Matrix<const T> m(x, "x");
    const Matrix<T> result(out, "out");
    const Filters<const T> filters(weight, m.cols, "weight");
    STD_TORCH_CHECK(result.rows == m.rows && result.cols == filters.out_channels, "out: expected [M, k]");
    const std::optional<Affine> a = optional_affine(mean, scale, shift, m.cols);
    const float* b = bias ? vector(*bias, filters.out_channels, "bias") : nullptr;
    const ImageTiles image(grid, m.rows);
    const Panels weights(filters.out_channels, steps_of<T>(m.cols), 16);
    const FilterStrides by = filters.strides;
    weights.each([&](int64_t p) {
      kernel.winograd_weight(filters.data + 32 * p * by.out, {by.in, by.out, by.tap}, m.cols, weights.valid(p),
                             weights.width(p), false, weights.panel(p), weights.size());
    });
    const Tiles tiles(image.count(), kForwardTiles, 8);
    tiles.run([&](int64_t chunk) {
      const int64_t largest = tiles.largest(), products_ld = weights.padded();
      const Transformed<T> v(largest, m.cols, false);
      const auto products = scratch<float>(16 * largest * products_ld);
      Pixels<const T> around(4, 1, largest), next(2, 0, largest);
      Pixels<T> inside(2, 0, largest);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        kernel.winograd_input(around.of(image, m, first, n), 0, n, m.cols, a ? &*a : nullptr, v.tiles());
        next.of(image, m, first + n, tiles.begin(std::min(tile + 2, (chunk + 1) * tiles.per_chunk)) - first - n);
        for (int64_t i = 0; i < 16; ++i) {
          prefetch(next.pointers, i, 16, 0, m.cols);
          for (int64_t p = 0; p < weights.count; ++p) {
            const int64_t width = weights.width(p);
            for (int64_t step = 0; step < weights.steps; step += kDepth) {
              kernel.product({v.at(i) + step, v.words, 1}, {weights.panel(p, i) + step * width, 0, width}, n, width,
                             std::min(weights.steps - step, kDepth), products.get() + i * n * products_ld + 32 * p,
                             products_ld, step > 0);
            }
          }
        }
        kernel.winograd_output(products.get(), products_ld, n, filters.out_channels, b,
                               inside.of(image, result, first, n));
      }
    });
  });
}

// D = conv3x3_input_grad(grad, weight) * (y > 0):  out = scale * D,  grad_weight,  sum D,  sum D * (x - mean)
Tensor bn_relu_conv3x3_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight,
                                std::vector<int64_t> grid, std::optional<Tensor> out,
                                std::optional<Tensor> grad_weight) {
  // [M, k], [M, B], [B] each, [k, B, 3, 3], [M, B], [k, B, 3, 3] float32
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels_of<T>();
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Filters<const T> filters(weight, m.cols, "weight");
    STD_TORCH_CHECK(g.rows == m.rows && g.cols == filters.out_channels, "grad: expected [M, k]");
    const bool need_weight = grad_weight.has_value();
    std::optional<Filters<float>> dw;
    if (need_weight) {
      dw.emplace(*grad_weight, m.cols, "grad_weight");
      STD_TORCH_CHECK(dw->out_channels == filters.out_channels, "grad_weight: expected the weight's shape");
    }
    const Affine a = affine(mean, scale, shift, m.cols);
    const ImageTiles image(grid, m.rows);
    std::optional<Matrix<T>> result;
    if (out) {
      result.emplace(*out, "out");
      STD_TORCH_CHECK(result->rows == m.rows && result->cols == m.cols, "out: expected x's shape");
      advise_huge_pages(*result);
    }
    const Panels weights(m.cols, steps_of<T>(g.cols), 16);
    const FilterStrides by = filters.strides;
    weights.each([&](int64_t p) {
      if (!out) return;
      kernel.winograd_weight(filters.data + 32 * p * by.in, {by.out, by.in, by.tap}, g.cols, weights.valid(p),
                             weights.width(p), true, weights.panel(p), weights.size());
    });
    const Tiles tiles(image.count(), kBackwardTiles, 8);
    std::vector<std::vector<float>> du(tiles.chunks);
    std::vector<ColumnSums> sums(tiles.chunks);
    tiles.run([&](int64_t chunk) {
      const int64_t largest = tiles.largest();
      const Transformed<T> dy(out ? largest : 0, g.cols, false), ady(need_weight ? largest : 0, g.cols, true);
      const Transformed<T> v(need_weight ? largest : 0, 32, true);
      const auto products = scratch<float>(out ? 16 * largest * 32 : 0);
      Pixels<const T> dy_around(4, 1, largest), dy_inside(2, 0, largest), x_around(4, 1, largest), x_inside(2, 0, largest),
          next(2, 0, largest);
      Pixels<T> out_inside(2, 0, largest);
      if (need_weight) du[chunk] = zeros(16 * g.cols * weights.padded());
      sums[chunk].reset(m.cols);
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
        if (n == 0) continue;
        T* const* to = nullptr;
        const T* const* x16 = nullptr;
        const T* const* x4 = x_inside.of(image, m, first, n);
        next.of(image, m, first + n, tiles.begin(std::min(tile + 2, (chunk + 1) * tiles.per_chunk)) - first - n);
        if (out) {
          kernel.winograd_input(dy_around.of(image, g, first, n), 0, n, g.cols, nullptr,
                                dy.tiles());
          to = out_inside.of(image, *result, first, n);
        }
        if (need_weight) {
          kernel.winograd_gradient(dy_inside.of(image, g, first, n), n, g.cols, ady.tiles());
          x16 = x_around.of(image, m, first, n);
        }
        sums[chunk].add([&](float* sum_d, float* sum_dx) {
          for (int64_t p = 0; p < weights.count; ++p) {
            const int64_t c = 32 * p, width = weights.width(p);
            const Affine columns = a.from(c);
            const bool last = p + 1 == weights.count;
            const auto fetch = [&](int64_t i) {
              prefetch(last ? next.pointers : x_inside.pointers, i, 16, last ? 0 : c + 32, 32);
            };
            if (out) {
              for (int64_t i = 0; i < 16; ++i) {
                fetch(i);
                kernel.product({dy.at(i), dy.words, 1}, weights.operand(p, i), n, width, weights.steps,
                               products.get() + i * n * width, width, false);
              }
              kernel.winograd_input_gradient(products.get(), width, n, weights.valid(p), x4, c, columns, to,
                                             sum_d + c, sum_dx + c);
            }
            if (need_weight) {
              kernel.winograd_input(x16, c, n, weights.valid(p), &columns, v.tiles());
              for (int64_t i = 0; i < 16; ++i) {
                kernel.product({ady.at(i), 1, ady.words}, {v.at(i), 0, v.words}, g.cols, width, steps_of<T>(n),
                               du[chunk].data() + i * g.cols * weights.padded() + c * g.cols, width, true);
              }
            }
          }
        });
      }
    });
    weights.each([&](int64_t p) {
      if (!need_weight) return;
      const int64_t width = weights.width(p), position = g.cols * weights.padded();
      const FilterStrides to = dw->strides;
      for (int64_t r = 0; r < g.cols; ++r) {
        float u[16 * 32];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t from = i * position + 32 * p * g.cols + r * width;
          std::copy_n(du[0].data() + from, width, u + i * width);
          for (size_t part = 1; part < du.size(); ++part) kernels().f32.add(du[part].data() + from, width, u + i * width);
        }
        kernel.winograd_weight_gradient(u, width, weights.valid(p), dw->data + r * to.out + 32 * p * to.in, to.in, to.tap);
      }
    });
    return out ? total(sums, x) : nothing(x);
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_conv3x3", TORCH_BOX(&densenet_fast::bn_relu_conv3x3));
  m.impl("cpu_bn_relu_conv3x3_backward", TORCH_BOX(&densenet_fast::bn_relu_conv3x3_backward));
}
