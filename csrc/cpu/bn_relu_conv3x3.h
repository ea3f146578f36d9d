// BN-ReLU-Conv3x3 in one to three dimensions, forward and backward: a batch of tiles is normalised and transformed into
// scratch, multiplied, and transformed back while it is in cache. Images and planes of volumes have minimal filtering
// (winograd.h); lines, and images and volumes of few pixels, nothing to transform (line.h). The three taps of a volume
// in depth, and all that are not transformed, are summed before anything is transformed back: for planes z,
//
//   y[z] = output(sum over i of filter[i] . input[z + i])      dfilter[i] = sum over z of gradient[z] . input[z + i]
//
// Example:
//
//   const Matrix<const float> m(x, "x");     // [98, B]: two images of 7x7 pixels
//   const Matrix<float> result(out, "out");  // [98, k], for a weight [k, B, 3, 3]
//   const Affine bn = affine(mean, scale, shift, m.cols);
//   conv3x3<float>(m, &bn, Filters<float>(weight), nullptr, {2, 7, 7}, result);
#pragma once

#include "image_tiles.h"
#include "panels.h"
#include "statistics.h"

namespace densenet_fast {

// Fetches part `part` of `parts` of the pixels of the next tiles, while a product keeps the processor busy
template <typename T>
void prefetch(const std::vector<T*>& pixels, int64_t part, int64_t parts, int64_t offset, int64_t cols) {
  const int64_t count = pixels.size();
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    for (int64_t c = 0; pixels[i] && c < cols; c += 64 / sizeof(T)) __builtin_prefetch(pixels[i] + offset + c, 0, 2);
  }
}

// Pixels across a tile whose values are of type Tile: the rounding of wider ones to bf16 would show
template <typename Tile>
constexpr int64_t kWidest = std::is_same_v<Tile, float> ? 4 : 2;

template <typename T>
const TileKernels<T>& tile_kernels(const ImageTiles& image) {
  const Kernels<T>& all = kernels_of<T>();
  return image.of_pixels() ? all.line : image.wide == 2 ? all.square : all.wide;
}

// As many as `count` values of as many as `tiles` tiles. Products read whole words, and of pairs multiples of 16
// columns: if there are as many as this but not of the matrix, `ragged`, what no tile is stored to stays zero.
template <typename T>
struct Transformed {
  int64_t words, position;  // in a row, from position to position
  bool paired;
  Scratch<T> data;

  Transformed(int64_t count, int64_t tiles, int64_t cols, bool paired, bool ragged)
      : words((paired ? cols : steps_of<T>(cols)) + (cols > 32 ? kSkew : 0)),
        position((paired ? steps_of<T>(tiles) : tiles) * words + kSkew),
        paired(paired),
        data(scratch<T>(count * position * kPerWord<T>)) {
    if (ragged) std::fill_n(data.get(), count * position * kPerWord<T>, T{});
  }

  TransformedTiles<T> tiles() const { return {data.get(), position * kPerWord<T>, words * kPerWord<T>, paired}; }

  const uint32_t* at(int64_t i) const { return as_words(data.get()) + i * position; }
};

constexpr int64_t kMostValues = 24;                             // of a transformed tile
constexpr int64_t kForwardPixels = 112, kBackwardPixels = 448;  // that a thread works on at a time

// Words that are summed at a time: the rounding of longer sums would show, sooner where the taps of three planes add up
template <typename Tile>
int64_t sum_depth(const ImageTiles& image) {
  return image.dims == 3 && std::is_same_v<Tile, float> ? 32 : 128;
}

// [k, B, 3, ...] in one to three dimensions, its taps evenly spaced (contiguous or channels last), of the matrices'
// dtype or float32, which is rounded as it is transformed
template <typename T>
struct Filters {
  int64_t dims, out_channels, in_channels;
  FilterStrides strides;
  const T* own = nullptr;
  const float* wide = nullptr;

  explicit Filters(const Tensor& weight)
      : dims(weight.dim() - 2),
        out_channels(weight.size(0)),
        in_channels(weight.size(1)),
        strides(evenly_spaced(weight, "weight")) {
    if (weight.scalar_type() == kDtype<T>) {
      own = static_cast<const T*>(weight.data_ptr());
    } else {
      STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight: dtype unlike the others', and not float32");
      wide = static_cast<const float*>(weight.data_ptr());
    }
  }

  Filters(const Tensor& weight, int64_t channels) : Filters(weight) {
    STD_TORCH_CHECK(in_channels == channels, "weight: expected ", channels, " input channels, got ", in_channels);
  }

  static FilterStrides evenly_spaced(const Tensor& t, const char* name) {
    const int64_t last = t.dim() - 1;
    bool even = 2 <= last && last <= 4;
    for (int64_t dim = 2; even && dim <= last; ++dim) {
      even = t.size(dim) == 3 && (dim == last || t.stride(dim) == 3 * t.stride(dim + 1));
    }
    STD_TORCH_CHECK(even, name, ": expected [k, B, 3, ...] in one to three dimensions, contiguous or channels last");
    return {t.stride(1), t.stride(0), t.stride(last)};
  }

  int64_t matrices(const ImageTiles& image) const { return image.values() * image.taps; }

  // Transformed panels of T or floats, a matrix for each value of a tile and tap: their columns are the output
  // channels, and the depth the input channels; or, turned, the other way round
  template <typename To>
  void transform(const ImageTiles& image, const Panels& panels, bool turned) const {
    const int64_t depth = turned ? out_channels : in_channels;
    constexpr int64_t kSlice = 32;
    const int64_t slices = (depth + kSlice - 1) / kSlice;
    const int64_t taps = image.steps.size();
    torch::stable::parallel_for(0, taps * panels.count * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i / taps / slices, k = i / taps % slices * kSlice;
        transform_slice<To>(image, panels, p, 32 * p, k, std::min(depth - k, kSlice), turned,
                            image.steps[i % taps].tap);
      }
    });
  }

  // Of panel p, whose first column is `column`, and of a tap, the slice of the depth from k on
  template <typename To>
  void transform_slice(const ImageTiles& image, const Panels& panels, int64_t p, int64_t column, int64_t k,
                       int64_t slice, bool turned, int64_t tap = 0) const {
    const FilterStrides s = turned ? FilterStrides{strides.out, strides.in, strides.tap} : strides;
    const int64_t first = column * s.out + k * s.in + image.tile_taps * (turned ? image.taps - 1 - tap : tap) * s.tap;
    const int64_t width = panels.width(p), valid = panels.valid(p);
    uint32_t* to = panels.panel(p, image.values() * tap) + k / kPerWord<To> * width;
    if (own && std::is_same_v<To, float>) {
      tile_kernels<T>(image).weight_to_floats(own + first, s, slice, valid, width, turned, to, panels.size());
    } else if (own) {
      tile_kernels<T>(image).weight(own + first, s, slice, valid, width, turned, to, panels.size());
    } else {
      tile_kernels<To>(image).weight_floats(wide + first, s, slice, valid, width, turned, to, panels.size());
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

template <typename T>
void check_dimensions(const Filters<T>& filters, const ImageTiles& image) {
  STD_TORCH_CHECK(filters.dims == image.dims, "weight: expected ", image.dims,
                  " spatial dimensions, as the grid has, got ", filters.dims);
}

// The tiles of relu(y), or of x, in either type
template <typename T>
void transform_input(const TileKernels<T>& kernel, const T* const* pixels, int64_t tiles, int64_t cols,
                     const Affine* affine, const Transformed<float>& out) {
  kernel.input_to_floats(pixels, 0, tiles, cols, affine, out.tiles());
}
inline void transform_input(const TileKernels<bf16>& kernel, const bf16* const* pixels, int64_t tiles, int64_t cols,
                            const Affine* affine, const Transformed<bf16>& out) {
  kernel.input(pixels, 0, tiles, cols, affine, out.tiles());
}

// sums [rows, width] = what all taps make of value i of `values` of tiles v, with panel p of their filters; `depth`
// words are summed at a time
template <typename Tile>
void multiply_taps(const Transformed<Tile>& v, const std::vector<Tap>& taps, const Panels& weights, int64_t p,
                   int64_t values, int64_t i, int64_t depth, float* sums, int64_t ld) {
  const int64_t width = weights.width(p);
  for (const Tap& tap : taps) {
    for (int64_t step = 0; step < weights.steps; step += depth) {
      kernels_of<Tile>().product({v.at(i) + tap.in * v.words + step, v.words, 1},
                                 {weights.panel(p, values * tap.number + i) + step * width, 0, width}, tap.rows, width,
                                 std::min(weights.steps - step, depth), sums + tap.out * ld, ld,
                                 step > 0 || &tap != &taps[0]);
    }
  }
}

// conv3x3 with transformed values of type Tile
template <typename Tile, typename T>
void conv3x3_in(const Matrix<const T>& x, const Affine* affine, const Filters<T>& filters, const float* bias,
                const std::vector<int64_t>& grid, const Matrix<T>& out) {
  const ImageTiles image(grid, x.rows, kWidest<Tile>);
  check_dimensions(filters, image);
  const TileKernels<T>& kernel = tile_kernels<T>(image);
  const Panels weights(filters.out_channels, steps_of<Tile>(x.cols), filters.matrices(image));
  filters.template transform<Tile>(image, weights, false);
  const int64_t values = image.values(), depth = sum_depth<Tile>(image);
  const Parts parts(image, kForwardPixels, 1);
  parts.tiles.share([&](auto each) {
    const int64_t largest = parts.largest(), products_ld = weights.padded();
    const Transformed<Tile> v(values, parts.largest_input(), x.cols, false, x.cols % kPerWord<Tile> != 0);
    const auto products = scratch<float>(values * largest * products_ld);
    Pixels<const T> around(image, true), next(image);
    Pixels<T> inside(image);
    each([&](int64_t, int64_t i, int64_t) {
      const Part part = parts[i];
      const int64_t n = part.rows();
      if (n == 0) return;
      const std::vector<Tap> taps = image.taps_of(part);
      transform_input(kernel, around.input(x, part), part.input_rows(), x.cols, affine, v);
      next.of(x, parts[std::min(i + 1, parts.tiles.rows - 1)]);
      for (int64_t i = 0; i < values; ++i) {
        prefetch(next.pointers, i, values, 0, x.cols);
        for (int64_t p = 0; p < weights.count; ++p) {
          multiply_taps(v, taps, weights, p, values, i, depth, products.get() + i * n * products_ld + 32 * p,
                        products_ld);
        }
      }
      kernel.output(products.get(), products_ld, n, out.cols, bias, inside.of(out, part));
    });
  });
}

// out [M, k] = conv3x3(relu(y), weight) + bias [k] for y = bn(x) [M, B]; relu(y) is x where the affine is null. Where
// bf16 are multiplied as floats, their tiles are not rounded.
template <typename T>
void conv3x3(const Matrix<const T>& x, const Affine* affine, const Filters<T>& filters, const float* bias,
             const std::vector<int64_t>& grid, const Matrix<T>& out) {
  return kernels().multiplies_bf16 ? conv3x3_in<T>(x, affine, filters, bias, grid, out)
                                   : conv3x3_in<float>(x, affine, filters, bias, grid, out);
}

// The gradients of conv3x3: of x, with the sums if that is asked for, and of the filters, unless null
template <typename T>
void conv3x3_backward(const Matrix<const T>& grad, const Matrix<const T>& x, Affine affine, const Filters<T>& filters,
                      const std::vector<int64_t>& grid, const InputGradient<T>& grad_x,
                      const FiltersGradient* grad_weight) {
  const Matrix<const T>* source = grad_x.source;
  const Matrix<T>* out = grad_x.out;
  const ImageTiles image(grid, x.rows, kWidest<T>);
  check_dimensions(filters, image);
  const TileKernels<T>& kernel = tile_kernels<T>(image);
  const int64_t values = image.values();
  const bool need_weight = grad_weight != nullptr;
  if (out) advise_huge_pages(*out);
  const Panels weights(x.cols, steps_of<T>(grad.cols), filters.matrices(image));
  if (out) filters.template transform<T>(image, weights, true);
  const Parts parts(image, kBackwardPixels, kPerWord<T>);
  const Tiles& tiles = parts.tiles;
  const int64_t du_position = grad.cols * weights.padded();
  std::vector<Accumulator> du(tiles.chunks * image.taps);
  std::vector<ColumnSums> sums_parts(tiles.chunks);
  tiles.run([&](int64_t chunk) {
    const int64_t largest = parts.largest(), largest_input = parts.largest_input();
    const Transformed<T> dy(values, out ? largest_input : 0, grad.cols, false, grad.cols % kPerWord<T> != 0);
    const Transformed<T> ady(values, need_weight ? largest : 0, grad.cols, true, grad.cols % 16 != 0);
    const Transformed<T> v(values, need_weight ? largest_input : 0, 32, true, x.cols % 16 != 0);
    const TransposedFactor<T> factor(need_weight ? grad.cols * steps_of<T>(largest) : 0, values);
    Operand transposed[kMostValues] = {};
    const auto products = scratch<float>(out ? values * largest * 32 : 0);
    Pixels<const T> dy_around(image, true), x_around(image, true), dy_inside(image), x_inside(image), next(image);
    Pixels<const T> source_inside(image);
    Pixels<T> out_inside(image);
    Accumulator* du_part = &du[chunk * image.taps];
    for (int64_t tap = 0; need_weight && tap < image.taps; ++tap) du_part[tap].reset(values * du_position);
    sums_parts[chunk].reset(x.cols);
    for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
      if (tiles.begin(tile) == tiles.begin(tile + 1)) continue;
      const Part part = parts[tiles.begin(tile)];
      const int64_t n = part.rows();
      if (n == 0) continue;
      const std::vector<Tap> taps = image.taps_of(part);
      const T* const* from = source ? source_inside.of(*source, part) : nullptr;
      T* const* to = nullptr;
      const T* const* x16 = nullptr;
      const T* const* x4 = x_inside.of(x, part);
      next.of(x, parts[std::min(tiles.begin(tile + 1), tiles.rows - 1)]);
      if (out) {
        kernel.input(dy_around.input(grad, part), 0, part.input_rows(), grad.cols, nullptr, dy.tiles());
        to = out_inside.of(*out, part);
      }
      if (need_weight) {
        kernel.gradient(dy_inside.of(grad, part), n, grad.cols, ady.tiles());
        for (int64_t i = 0; i < values; ++i) {
          transposed[i] = factor.of(ady.at(i), ady.words, grad.cols, steps_of<T>(n), i);
        }
        x16 = x_around.input(x, part);
      }
      sums_parts[chunk].add([&](GradientSums own) {
        for (int64_t p = 0; p < weights.count; ++p) {
          const int64_t c = 32 * p, width = weights.width(p);
          const Affine columns = affine.from(c);
          const bool last = p + 1 == weights.count;
          const auto fetch = [&](int64_t i) {
            prefetch(last ? next.pointers : x_inside.pointers, i, values, last ? 0 : c + 32, 32);
          };
          if (out) {
            for (int64_t i = 0; i < values; ++i) {
              fetch(i);
              for (const Tap& tap : taps) {
                kernels_of<T>().product({dy.at(i) + tap.in * dy.words, dy.words, 1},
                                        weights.operand(p, values * tap.number + i), tap.rows, width, weights.steps,
                                        products.get() + (i * n + tap.out) * width, width, &tap != &taps[0]);
              }
            }
            kernel.input_gradient(products.get(), width, n, weights.valid(p), {x4, from, to, c}, columns,
                                  {own.d + c, own.dx + c});
          }
          if (need_weight) {
            kernel.input(x16, c, part.input_rows(), weights.valid(p), &columns, v.tiles());
            for (int64_t i = 0; i < values; ++i) {
              for (const Tap& tap : taps) {
                const int64_t first = tap.out / kPerWord<T>, steps = steps_of<T>(tap.rows);
                const Operand left = {transposed[i].words + first * transposed[i].step, transposed[i].row,
                                      transposed[i].step};
                kernels_of<T>().product(left, {v.at(i) + tap.in / kPerWord<T> * v.words, 0, v.words}, grad.cols, width,
                                        steps, du_part[tap.number].values.get() + i * du_position + c * grad.cols,
                                        width, tap.more || du_part[tap.number].started);
              }
            }
          }
        }
      });
      for (const Tap& tap : taps) du_part[tap.number].started = true;
    }
    for (int64_t tap = 0; need_weight && tap < image.taps; ++tap) du_part[tap].finish();
  });
  weights.each([&](int64_t p) {
    if (!need_weight) return;
    const int64_t width = weights.width(p);
    const FilterStrides to = grad_weight->strides;
    for (int64_t r = 0; r < grad.cols; ++r) {
      for (int64_t tap = 0; tap < image.taps; ++tap) {
        float u[kMostValues * 32];
        for (int64_t i = 0; i < values; ++i) {
          const int64_t from = i * du_position + 32 * p * grad.cols + r * width;
          std::copy_n(du[tap].values.get() + from, width, u + i * width);
          for (size_t part = image.taps + tap; part < du.size(); part += image.taps) {
            kernels().f32.add(du[part].values.get() + from, width, u + i * width);
          }
        }
        float* filter = grad_weight->data + r * to.out + 32 * p * to.in + image.tile_taps * tap * to.tap;
        kernel.weight_gradient(u, width, weights.valid(p), filter, to.in, to.tap);
      }
    }
  });
  if (out) total(sums_parts, grad_x.sums);
}

}  // namespace densenet_fast
