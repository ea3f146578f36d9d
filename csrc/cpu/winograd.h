// The 3x3 convolution by minimal filtering in both directions (minimal_filtering.h), as in Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks" (https://arxiv.org/abs/1509.09308): F(2, 3) down and F(W, 3) across, 16
// or 24 products per channel for a tile of 2x2 or 2x4 outputs, where the definition takes 36 or 72. For the outputs y
// of a tile, the inputs d around it and a filter g, all per pair of channels,
//
//   y = A^T [(G g G^T) . (B^T d B)] A      dg = G^T [(A dy A^T) . (B^T d B)] G
//
// and dd is y for dy as the input, with g turned by 180 degrees; the matrices at the right are those of F(W, 3). The
// products are summed over channels (for dg, over tiles) as matrix products, one for each position.
//
// Example:
//
//   const TileKernels<float> kernel = winograd_kernels<4, float>();  // tiles of 2x4 pixels: Kernels<float>::wide
//   kernel.input(around, 0, tiles, 64, &affine, {values, tiles * 64, 64, false});  // values [24, tiles, 64]
//   // m [24, tiles, 32]: 24 products of values with transformed filters
//   kernel.output(m, 32, tiles, 32, nullptr, inside);  // to the pixels of the tiles
#pragma once

#include "minimal_filtering.h"
#include "product.h"
#include "transpose.h"
#include "vectors.h"

namespace densenet_fast {
namespace {

// Of a tile of 2xW outputs
template <int W>
struct Shape {
  static constexpr int kPixels = 2 * W, kAcross = W + 2, kValues = 4 * kAcross;
};

template <typename V, int COUNT>
struct VectorArray {
  V v[COUNT];
};

// transform<N>(c) makes a function f(tile, emit), called in the order of the tiles, that emits (i, value) for each of
// the values of a tile at columns c, c + 1, ...; stores them to out
template <int VALUES, typename T, typename F>
inline void transform_tiles(int64_t tiles, int64_t cols, TransformedTiles<T> out, F transform) {
  columns(cols, [&]<int N>(int64_t c) {
    auto tile = transform.template operator()<N>(c);
    if (sizeof(T) == 4 || !out.paired) {
      T* to = out.data + c;
      const int64_t position = out.position, row = out.row;
      for (int64_t t = 0; t < tiles; ++t, to += row) {
        tile(t, [=](int i, floats<N> v) { store<N>(to + i * position, v); });
      }
    } else {
      T* to = out.data + 2 * c;
      for (int64_t t = 0; t < tiles; t += 2, to += out.row) {
        floats<N> first[VALUES];
        const auto both = [&](int i, floats<N> second) {
          const auto words = pair<N>(first[i], second);
          __builtin_memcpy(to + i * out.position, &words, sizeof(words));
        };
        tile(t, [&](int i, floats<N> v) { first[i] = v; });
        if (t + 1 < tiles) {
          tile(t + 1, both);
        } else {
          for (int i = 0; i < VALUES; ++i) both(i, floats<N>{});
        }
      }
    }
  });
}

// B^T d B of the pixels around tiles, [tiles][kValues], null outside the image, as pixel<N>(c) makes functions that
// load them
template <int W, typename T, typename To, typename F>
inline void input_tiles(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<To> out, F pixel) {
  constexpr int kAcross = Shape<W>::kAcross, kValues = Shape<W>::kValues;
  transform_tiles<kValues>(tiles, cols, out, [&]<int N>(int64_t c) {
    return [=, load_pixel = pixel.template operator()<N>(c), line = VectorArray<floats<N>, kValues>()](
               int64_t t, auto emit) mutable {
      const T* const* tile = pixels + kValues * t;
      const bool right_of_the_last = t > 0 && tile[kAcross + 1] == tile[kAcross + W + 1 - kValues];
      const auto down = [&](int j) {
        floats<N> d[4];
        for (int i = 0; i < 4; ++i) d[i] = load_pixel(tile[kAcross * i + j]);
        Filtering<2>::input(d, 1, line.v + j, kAcross);
      };
      if (right_of_the_last) {
        for (int i = 0; i < kValues; i += kAcross) {
          line.v[i] = line.v[i + W];
          line.v[i + 1] = line.v[i + W + 1];
        }
      } else {
        down(0);
        down(1);
      }
#pragma GCC unroll 4
      for (int j = 2; j < kAcross; ++j) down(j);
      for (int i = 0; i < kValues; i += kAcross) {
        floats<N> v[kAcross];
        Filtering<W>::input(line.v + i, 1, v, 1);
        for (int j = 0; j < kAcross; ++j) emit(i + j, v[j]);
      }
    };
  });
}

// B^T relu(y) B, or B^T x B without an affine
template <int W, typename T, typename To>
void winograd_input(const T* const* pixels, int64_t offset, int64_t tiles, int64_t cols, const Affine* affine,
                    TransformedTiles<To> out) {
  if (affine == nullptr) {
    input_tiles<W>(pixels, tiles, cols, out, [&]<int N>(int64_t c) {
      return [=](const T* pixel) { return pixel ? load<N>(pixel + offset + c) : floats<N>{}; };
    });
    return;
  }
  input_tiles<W>(pixels, tiles, cols, out, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(*affine, c);
    return [=](const T* pixel) { return pixel ? relu(bn(load<N>(pixel + offset + c))) : floats<N>{}; };
  });
}

// A dy A^T; pixels [tiles][kPixels], null outside the image
template <int W, typename T>
void winograd_gradient(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<T> out) {
  transform_tiles<Shape<W>::kValues>(tiles, cols, out, [&]<int N>(int64_t c) {
    return [=](int64_t t, auto emit) {
      const T* const* tile = pixels + 2 * W * t;
      floats<N> rows[4][W];
      for (int j = 0; j < W; ++j) {
        floats<N> y[2];
        for (int i = 0; i < 2; ++i) y[i] = tile[W * i + j] ? load<N>(tile[W * i + j] + c) : floats<N>{};
        Filtering<2>::gradient(y, 1, rows[0] + j, W);
      }
      for (int i = 0; i < 4; ++i) {
        floats<N> v[W + 2];
        Filtering<W>::gradient(rows[i], 1, v, 1);
        for (int j = 0; j < W + 2; ++j) emit((W + 2) * i + j, v[j]);
      }
    };
  });
}

// A tile's pixels from its products
template <int W>
struct Rectangle : Shape<W> {
  // y = A^T m A of one tile at columns c, c + 1, ... of m [kValues, tiles, ld]
  template <int N>
  static void output(const float* m, int64_t position, floats<N>* y) {
    constexpr int kAcross = W + 2;
    floats<N> rows[2][kAcross];
    for (int j = 0; j < kAcross; ++j) {
      floats<N> column[4];
      for (int i = 0; i < 4; ++i) column[i] = load<N>(m + (kAcross * i + j) * position);
      Filtering<2>::output(column, 1, rows[0] + j, kAcross);
    }
    for (int i = 0; i < 2; ++i) Filtering<W>::output(rows[i], 1, y + W * i, 1);
  }
};

template <typename T, typename Tile>
void tile_output(const float* m, int64_t ld, int64_t tiles, int64_t cols, const float* bias, T* const* pixels) {
  constexpr int kPixels = Tile::kPixels;
  for (int64_t t = 0; t < tiles; ++t) {
    columns(cols, [&]<int N>(int64_t c) {
      floats<N> y[kPixels];
      Tile::template output<N>(m + t * ld + c, tiles * ld, y);
      for (int i = 0; i < kPixels; ++i) {
        T* pixel = pixels[kPixels * t + i];
        if (pixel) store<N>(pixel + c, bias ? y[i] + load<N>(bias + c) : y[i]);
      }
    });
  }
}

template <typename T, typename Tile>
void tile_input_gradient(const float* m, int64_t ld, int64_t tiles, int64_t cols, GradientPixels<T> pixels,
                         Affine affine, GradientSums sums) {
  constexpr int kPixels = Tile::kPixels, kPart = 16 / kPixels;
  columns(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    const int64_t from = pixels.offset + c;
    MaskSums<N> own, part;
    for (int64_t t = 0; t < tiles; ++t) {
      if (t % kPart == 0) {
        own.add(part);
        part = {};
      }
      floats<N> d[kPixels];
      Tile::template output<N>(m + t * ld + c, tiles * ld, d);
      for (int i = 0; i < kPixels; ++i) {
        const int64_t pixel = kPixels * t + i;
        if (!pixels.out[pixel]) continue;
        const floats<N> centred = load<N>(pixels.x[pixel] + from) - bn.mean;
        const floats<N> masked = centred * bn.scale + bn.shift <= 0 ? floats<N>{} : d[i];
        part.add(masked, centred);
        const floats<N> before = pixels.source ? load<N>(pixels.source[pixel] + from) : floats<N>{};
        store<N>(pixels.out[pixel] + from, before + bn.scale * masked);
      }
    }
    own.add(part);
    own.add_to(sums, c);
  });
}

// The nine taps of kLanes filters for each of kLanes channels, [channel][tap][filter], as vectors. Filters of which
// neither the channels nor the taps are adjacent, or fewer, are read one value after the other.
template <typename S>
struct FilterSquare {
  floats<kLanes> taps[kLanes][9];

  void load_from(const S* first, FilterStrides strides, int64_t channels, int64_t filters) {
    const bool whole = channels == kLanes && filters == kLanes;
    if (whole && strides.in == 1) {
      for (int i = 0; i < 9; ++i) {
        floats<kLanes> square[kLanes];
        for (int j = 0; j < kLanes; ++j) square[j] = load<kLanes>(first + j * strides.out + i * strides.tap);
        transpose_square(square);
        for (int c = 0; c < kLanes; ++c) taps[c][i] = square[c];
      }
    } else if (whole && strides.tap == 1 && strides.in == 9) {
      for (int part = 0; part < 9; ++part) {
        floats<kLanes> square[kLanes];
        for (int j = 0; j < kLanes; ++j) square[j] = load<kLanes>(first + j * strides.out + part * kLanes);
        transpose_square(square);
        for (int i = 0; i < kLanes; ++i) taps[(part * kLanes + i) / 9][(part * kLanes + i) % 9] = square[i];
      }
    } else if (strides.out == 1 && filters == kLanes) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int i = 0; i < 9; ++i) taps[c][i] = load<kLanes>(first + c * strides.in + i * strides.tap);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int i = 0; i < 9; ++i) {
          float values[kLanes] = {};
          const S* from = first + c * strides.in + i * strides.tap;
          for (int64_t j = 0; j < filters; ++j) values[j] = load<1>(from + j * strides.out)[0];
          taps[c][i] = load<kLanes>(values);
        }
      }
    }
  }
};

// word(value, k, j) of G g G^T for filters g
template <int W, typename T, typename S>
void winograd_weight(const S* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width, bool turned,
                     uint32_t* out, int64_t position) {
  constexpr int64_t per_word = 4 / sizeof(T);
  constexpr int kAcross = W + 2, kValues = 4 * kAcross;
  using V = floats<kLanes>;
  FilterSquare<S> square;
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t channels = depth - k < kLanes ? depth - k : kLanes;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = cols - c < 0 ? 0 : cols - c < kLanes ? cols - c : kLanes;
      square.load_from(filters + k * strides.in + c * strides.out, strides, channels, count);
      for (int64_t step = 0; step * per_word < channels; ++step) {
        V u[per_word][kValues];
        for (int64_t half = 0; half < per_word; ++half) {
          const int64_t channel = step * per_word + half;
          if (channel >= channels) {
            for (V& value : u[half]) value = V{};
            continue;
          }
          const V* taps = square.taps[channel];
          V g[9], rows[12];
          for (int i = 0; i < 9; ++i) g[i] = taps[turned ? 8 - i : i];
          for (int j = 0; j < 3; ++j) Filtering<2>::filter(g + j, 3, rows + j, 3);
          for (int i = 0; i < 4; ++i) Filtering<W>::filter(rows + 3 * i, 1, u[half] + kAcross * i, 1);
        }
        for (int i = 0; i < kValues; ++i) {
          uint32_t* words = out + i * position + (k / per_word + step) * width + c;
          if constexpr (per_word == 1) {
            __builtin_memcpy(words, &u[0][i], sizeof(V));
          } else {
            const auto pairs = pair<kLanes>(u[0][i], u[1][i]);
            __builtin_memcpy(words, &pairs, sizeof(pairs));
          }
        }
      }
    }
  }
}

// dg = G^T u G for `cols` filters from u [kValues, cols] with rows `position` apart
template <int W>
void winograd_weight_gradient(const float* u, int64_t position, int64_t cols, float* out, int64_t col_stride,
                              int64_t tap_stride) {
  constexpr int kAcross = W + 2;
  columns(cols, [&]<int N>(int64_t c) {
    floats<N> v[4 * kAcross], rows[3 * kAcross], g[9];
    for (int i = 0; i < 4 * kAcross; ++i) v[i] = load<N>(u + i * position + c);
    for (int j = 0; j < kAcross; ++j) Filtering<2>::filter_gradient(v + j, kAcross, rows + j, kAcross);
    for (int i = 0; i < 3; ++i) Filtering<W>::filter_gradient(rows + kAcross * i, 1, g + 3 * i, 1);
    if (col_stride == 1) {
      for (int i = 0; i < 9; ++i) store<N>(out + c + i * tap_stride, g[i]);
    } else {
      for (int j = 0; j < N; ++j) {
        for (int i = 0; i < 9; ++i) out[(c + j) * col_stride + i * tap_stride] = g[i][j];
      }
    }
  });
}

template <int W, typename T>
constexpr TileKernels<T> winograd_kernels() {
  return {.weight = winograd_weight<W, T, T>,
          .weight_floats = winograd_weight<W, T, float>,
          .weight_to_floats = winograd_weight<W, float, T>,
          .input_to_floats = winograd_input<W, T, float>,
          .input = winograd_input<W, T, T>,
          .gradient = winograd_gradient<W, T>,
          .output = tile_output<T, Rectangle<W>>,
          .input_gradient = tile_input_gradient<T, Rectangle<W>>,
          .weight_gradient = winograd_weight_gradient<W>};
}

}  // namespace
}  // namespace densenet_fast
