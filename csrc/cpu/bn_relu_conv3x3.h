// BN-ReLU-Conv3x3 of two-dimensional images, forward and backward, by minimal filtering (winograd.h): a batch of 2x2
// tiles is normalised and transformed into scratch, multiplied, and transformed back while it is in cache.
#pragma once

#include "tiles.h"

namespace densenet_fast {

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
        position((paired ? steps_of<T>(tiles) : tiles) * words + kSkew),
        paired(paired),
        data(scratch<T>(16 * position * kPerWord<T>)) {
    std::fill_n(data.get(), 16 * position * kPerWord<T>, T{});
  }

  TransformedTiles<T> tiles() const { return {data.get(), position * kPerWord<T>, words * kPerWord<T>, paired}; }

  const uint32_t* at(int64_t i) const { return as_words(data.get()) + i * position; }
};

constexpr int64_t kForwardTiles = 28, kBackwardTiles = 112;
constexpr int64_t kSumDepth = 128;  // words that are summed at a time: the rounding of longer sums would show

// [k, B, 3, 3], its taps evenly spaced (contiguous or channels last), of the matrices' dtype or float32, which is
// rounded as it is transformed
template <typename T>
struct Filters {
  int64_t out_channels, in_channels;
  FilterStrides strides;
  const T* own = nullptr;
  const float* wide = nullptr;

  explicit Filters(const Tensor& weight)
      : out_channels(weight.size(0)), in_channels(weight.size(1)), strides(evenly_spaced(weight, "weight")) {
    if (weight.scalar_type() == kDtype<T>) {
      own = static_cast<const T*>(weight.data_ptr());
    } else {
      STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight: dtype unlike the others', and not float32");
      wide = static_cast<const float*>(weight.data_ptr());
    }
  }

  static FilterStrides evenly_spaced(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(2) == 3 && t.size(3) == 3 && t.stride(2) == 3 * t.stride(3), name,
                    ": expected [k, B, 3, 3], contiguous or channels last");
    return {t.stride(1), t.stride(0), t.stride(3)};
  }

  // Transformed panels of T or floats: their columns are the output channels, and the depth the input channels; or,
  // turned, the other way round
  template <typename To>
  void transform(const Panels& panels, bool turned) const {
    const int64_t depth = turned ? out_channels : in_channels;
    constexpr int64_t kSlice = 32;
    const int64_t slices = (depth + kSlice - 1) / kSlice;
    torch::stable::parallel_for(0, panels.count * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i / slices, k = i % slices * kSlice;
        transform_slice<To>(panels, p, 32 * p, k, std::min(depth - k, kSlice), turned);
      }
    });
  }

  // Of panel p, whose first column is `column`, the slice of the depth from k on
  template <typename To>
  void transform_slice(const Panels& panels, int64_t p, int64_t column, int64_t k, int64_t slice, bool turned) const {
    const FilterStrides s = turned ? FilterStrides{strides.out, strides.in, strides.tap} : strides;
    const int64_t first = column * s.out + k * s.in, width = panels.width(p), valid = panels.valid(p);
    uint32_t* to = panels.panel(p) + k / kPerWord<To> * width;
    if (own && std::is_same_v<To, float>) {
      kernels_of<T>().winograd_weight_to_floats(own + first, s, slice, valid, width, turned, to, panels.size());
    } else if (own) {
      kernels_of<T>().winograd_weight(own + first, s, slice, valid, width, turned, to, panels.size());
    } else {
      kernels_of<To>().winograd_weight_floats(wide + first, s, slice, valid, width, turned, to, panels.size());
    }
  }
};

// The gradient of filters, float32
struct FiltersGradient {
  float* data;
  FilterStrides strides;

  explicit FiltersGradient(const Tensor& t)
      : data(static_cast<float*>(t.data_ptr())), strides(Filters<float>::evenly_spaced(t, "grad_weight")) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "grad_weight: expected float32");
  }
};

// The tiles of relu(y), or of x, in either type
template <typename T>
void transform_input(const T* const* pixels, int64_t tiles, int64_t cols, const Affine* affine,
                     const Transformed<float>& out) {
  kernels_of<T>().winograd_input_to_floats(pixels, 0, tiles, cols, affine, out.tiles());
}
inline void transform_input(const bf16* const* pixels, int64_t tiles, int64_t cols, const Affine* affine,
                            const Transformed<bf16>& out) {
  kernels_of<bf16>().winograd_input(pixels, 0, tiles, cols, affine, out.tiles());
}

// conv3x3 with transformed values of type Tile
template <typename Tile, typename T>
void conv3x3_in(const Matrix<const T>& x, const Affine* affine, const Filters<T>& filters, const float* bias,
                const ImageTiles& image, const Matrix<T>& out) {
  const Kernels<T>& kernel = kernels_of<T>();
  const Panels weights(filters.out_channels, steps_of<Tile>(x.cols), 16);
  filters.template transform<Tile>(weights, false);
  const Tiles tiles(image.count(), kForwardTiles, 8);
  tiles.share([&](auto each) {
    const int64_t largest = tiles.largest(), products_ld = weights.padded();
    const Transformed<Tile> v(largest, x.cols, false);
    const auto products = scratch<float>(16 * largest * products_ld);
    Pixels<const T> around(4, 1, largest), next(2, 0, largest);
    Pixels<T> inside(2, 0, largest);
    each([&](int64_t tile, int64_t first, int64_t n) {
      transform_input(around.of(image, x, first, n), n, x.cols, affine, v);
      next.of(image, x, first + n, tiles.begin(std::min(tile + 2, tiles.count())) - first - n);
      for (int64_t i = 0; i < 16; ++i) {
        prefetch(next.pointers, i, 16, 0, x.cols);
        for (int64_t p = 0; p < weights.count; ++p) {
          const int64_t width = weights.width(p);
          for (int64_t step = 0; step < weights.steps; step += kSumDepth) {
            kernels_of<Tile>().product({v.at(i) + step, v.words, 1}, {weights.panel(p, i) + step * width, 0, width}, n,
                                       width, std::min(weights.steps - step, kSumDepth),
                                       products.get() + i * n * products_ld + 32 * p, products_ld, step > 0);
          }
        }
      }
      kernel.winograd_output(products.get(), products_ld, n, out.cols, bias, inside.of(image, out, first, n));
    });
  });
}

// out [M, k] = conv3x3(relu(y), weight) + bias for y = bn(x) [M, B]; relu(y) is x where the affine is null. Where bf16
// are multiplied as floats, their tiles are not rounded.
template <typename T>
void conv3x3(const Matrix<const T>& x, const Affine* affine, const Filters<T>& filters, const float* bias,
             const ImageTiles& image, const Matrix<T>& out) {
  return kernels().multiplies_bf16 ? conv3x3_in<T>(x, affine, filters, bias, image, out)
                                   : conv3x3_in<float>(x, affine, filters, bias, image, out);
}

// D = conv3x3_input_grad(grad, weight) * (y > 0):  out = source + scale * D, without the source if that is null, with
// sums [2, B] = (sum D, sum D * (x - mean));  and grad_weight; each unless null
template <typename T>
void conv3x3_backward(const Matrix<const T>& grad, const Matrix<const T>& x, Affine affine, const Filters<T>& filters,
                      const ImageTiles& image, const Matrix<const T>* source, const Matrix<T>* out, float* sums,
                      const FiltersGradient* grad_weight) {
  const Kernels<T>& kernel = kernels_of<T>();
  const bool need_weight = grad_weight != nullptr;
  if (out) advise_huge_pages(*out);
  const Panels weights(x.cols, steps_of<T>(grad.cols), 16);
  if (out) filters.template transform<T>(weights, true);
  const Tiles tiles(image.count(), kBackwardTiles, 8);
  std::vector<Accumulator> du(tiles.chunks);
  std::vector<ColumnSums> sums_parts(tiles.chunks);
  tiles.run([&](int64_t chunk) {
    const int64_t largest = tiles.largest();
    const Transformed<T> dy(out ? largest : 0, grad.cols, false), ady(need_weight ? largest : 0, grad.cols, true);
    const Transformed<T> v(need_weight ? largest : 0, 32, true);
    const TransposedFactor<T> factor(need_weight ? grad.cols * steps_of<T>(largest) : 0, 16);
    Operand transposed[16] = {};
    const auto products = scratch<float>(out ? 16 * largest * 32 : 0);
    Pixels<const T> dy_around(4, 1, largest), dy_inside(2, 0, largest), x_around(4, 1, largest),
        x_inside(2, 0, largest), next(2, 0, largest);
    Pixels<T> out_inside(2, 0, largest);
    Pixels<const T> source_inside(2, 0, largest);
    Accumulator& du_part = du[chunk];
    if (need_weight) du_part.reset(16 * grad.cols * weights.padded());
    sums_parts[chunk].reset(x.cols);
    for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
      const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
      if (n == 0) continue;
      const T* const* from = source ? source_inside.of(image, *source, first, n) : nullptr;
      T* const* to = nullptr;
      const T* const* x16 = nullptr;
      const T* const* x4 = x_inside.of(image, x, first, n);
      next.of(image, x, first + n, tiles.begin(std::min(tile + 2, (chunk + 1) * tiles.per_chunk)) - first - n);
      if (out) {
        kernel.winograd_input(dy_around.of(image, grad, first, n), 0, n, grad.cols, nullptr, dy.tiles());
        to = out_inside.of(image, *out, first, n);
      }
      if (need_weight) {
        kernel.winograd_gradient(dy_inside.of(image, grad, first, n), n, grad.cols, ady.tiles());
        for (int64_t i = 0; i < 16; ++i) {
          transposed[i] = factor.of(ady.at(i), ady.words, grad.cols, steps_of<T>(n), i);
        }
        x16 = x_around.of(image, x, first, n);
      }
      sums_parts[chunk].add([&](float* sum_d, float* sum_dx) {
        for (int64_t p = 0; p < weights.count; ++p) {
          const int64_t c = 32 * p, width = weights.width(p);
          const Affine columns = affine.from(c);
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
            kernel.winograd_input_gradient(products.get(), width, n, weights.valid(p), x4, c, columns, from, to,
                                           sum_d + c, sum_dx + c);
          }
          if (need_weight) {
            kernel.winograd_input(x16, c, n, weights.valid(p), &columns, v.tiles());
            for (int64_t i = 0; i < 16; ++i) {
              kernel.product(transposed[i], {v.at(i), 0, v.words}, grad.cols, width, steps_of<T>(n),
                             du_part.values.get() + i * grad.cols * weights.padded() + c * grad.cols, width,
                             du_part.started);
            }
          }
        }
      });
      du_part.started = true;
    }
    if (need_weight) du_part.finish();
  });
  weights.each([&](int64_t p) {
    if (!need_weight) return;
    const int64_t width = weights.width(p), position = grad.cols * weights.padded();
    const FilterStrides to = grad_weight->strides;
    for (int64_t r = 0; r < grad.cols; ++r) {
      float u[16 * 32];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t from = i * position + 32 * p * grad.cols + r * width;
        std::copy_n(du[0].values.get() + from, width, u + i * width);
        for (size_t part = 1; part < du.size(); ++part) {
          kernels().f32.add(du[part].values.get() + from, width, u + i * width);
        }
      }
      float* filter = grad_weight->data + r * to.out + 32 * p * to.in;
      kernel.winograd_weight_gradient(u, width, weights.valid(p), filter, to.in, to.tap);
    }
  });
  if (out) total(sums_parts, sums);
}

}  // namespace densenet_fast
