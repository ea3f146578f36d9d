// The 3x3 convolution by minimal filtering, F(2x2, 3x3) of Winograd 1980 as in Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks" (https://arxiv.org/abs/1509.09308): 16 products per channel where the definition
// takes 36. For a tile of 2x2 outputs y, the 4x4 inputs d around it and a filter g, all per pair of channels,
//
//   y = A^T [(G g G^T) . (B^T d B)] A      dg = G^T [(A dy A^T) . (B^T d B)] G
//
// and dd is y for dy as the input, with g turned by 180 degrees. The 16 products are summed over channels (for dg, over
// tiles) as matrix products, one for each position.
#pragma once

#include "product.h"
#include "transpose.h"
#include "vectors.h"

namespace densenet_fast {
namespace {

template <typename V>
struct Lines {
  V v[16];
};

// B^T d, over four vectors into four, `stride` apart
template <typename V>
inline void input_line(V d0, V d1, V d2, V d3, V* out, int stride) {
  out[0] = d0 - d2;
  out[stride] = d1 + d2;
  out[2 * stride] = d2 - d1;
  out[3 * stride] = d1 - d3;
}

// transform<N>(c) makes a function f(tile, emit), called in the order of the tiles, that emits (i, value) for each of
// the values of a tile at columns c, c + 1, ...; stores them to out
template <int VALUES = 16, typename T, typename F>
inline void transform_tiles(int64_t tiles, int64_t cols, TransformedTiles<T> out, F transform) {
  columns(cols, [&]<int N>(int64_t c) {
    auto tile = transform.template operator()<N>(c);
    if (sizeof(T) == 4 || !out.paired) {
      T* to = out.data + c;
      for (int64_t t = 0; t < tiles; ++t, to += out.row) {
        tile(t, [&](int i, floats<N> v) { store<N>(to + i * out.position, v); });
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

// B^T d B of the pixels [tiles][16], null outside the image, as pixel<N>(c) makes functions that load them
template <typename T, typename To, typename F>
inline void input_tiles(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<To> out, F pixel) {
  transform_tiles(tiles, cols, out, [&]<int N>(int64_t c) {
    return [=, load_pixel = pixel.template operator()<N>(c), line = Lines<floats<N>>()](int64_t t, auto emit) mutable {
      const T* const* tile = pixels + 16 * t;
      const auto down = [&](int j) {
        input_line(load_pixel(tile[j]), load_pixel(tile[4 + j]), load_pixel(tile[8 + j]), load_pixel(tile[12 + j]),
                   line.v + j, 4);
      };
      const bool right_of_the_last = t > 0 && tile[5] == tile[7 - 16];
      if (right_of_the_last) {
        for (int i = 0; i < 16; i += 4) {
          line.v[i] = line.v[i + 2];
          line.v[i + 1] = line.v[i + 3];
        }
      } else {
        down(0);
        down(1);
      }
      down(2);
      down(3);
      for (int i = 0; i < 16; i += 4) {
        floats<N> v[4];
        input_line(line.v[i], line.v[i + 1], line.v[i + 2], line.v[i + 3], v, 1);
        for (int j = 0; j < 4; ++j) emit(i + j, v[j]);
      }
    };
  });
}

// B^T relu(y) B, or B^T x B without an affine; pixels [tiles][16], null outside the image
template <typename T, typename To>
void winograd_input(const T* const* pixels, int64_t offset, int64_t tiles, int64_t cols, const Affine* affine,
                    TransformedTiles<To> out) {
  if (affine == nullptr) {
    input_tiles(pixels, tiles, cols, out, [&]<int N>(int64_t c) {
      return [=](const T* pixel) { return pixel ? load<N>(pixel + offset + c) : floats<N>{}; };
    });
    return;
  }
  input_tiles(pixels, tiles, cols, out, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine->mean + c), scale = load<N>(affine->scale + c);
    const floats<N> shift = load<N>(affine->shift + c);
    return [=](const T* pixel) {
      return pixel ? relu((load<N>(pixel + offset + c) - mean) * scale + shift) : floats<N>{};
    };
  });
}

// A dy A^T; pixels [tiles][4], null outside the image
template <typename T>
void winograd_gradient(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<T> out) {
  transform_tiles(tiles, cols, out, [&]<int N>(int64_t c) {
    return [=](int64_t t, auto emit) {
      floats<N> rows[4][2];
      for (int j = 0; j < 2; ++j) {
        const T *upper = pixels[4 * t + j], *lower = pixels[4 * t + 2 + j];
        const floats<N> first = upper ? load<N>(upper + c) : floats<N>{};
        const floats<N> second = lower ? load<N>(lower + c) : floats<N>{};
        rows[0][j] = first;
        rows[1][j] = first + second;
        rows[2][j] = first - second;
        rows[3][j] = -second;
      }
      for (int i = 0; i < 4; ++i) {
        emit(4 * i, rows[i][0]);
        emit(4 * i + 1, rows[i][0] + rows[i][1]);
        emit(4 * i + 2, rows[i][0] - rows[i][1]);
        emit(4 * i + 3, -rows[i][1]);
      }
    };
  });
}

// A tile's pixels from its products
struct Square {
  static constexpr int kPixels = 4;

  // y = A^T m A of one tile at columns c, c + 1, ... of m [16, tiles, ld]
  template <int N>
  static void output(const float* m, int64_t position, floats<N>* y) {
    floats<N> rows[2][4];
    for (int j = 0; j < 4; ++j) {
      const floats<N> m0 = load<N>(m + j * position), m1 = load<N>(m + (4 + j) * position);
      const floats<N> m2 = load<N>(m + (8 + j) * position), m3 = load<N>(m + (12 + j) * position);
      rows[0][j] = m0 + m1 + m2;
      rows[1][j] = m1 - m2 - m3;
    }
    for (int i = 0; i < 2; ++i) {
      y[2 * i] = rows[i][0] + rows[i][1] + rows[i][2];
      y[2 * i + 1] = rows[i][1] - rows[i][2] - rows[i][3];
    }
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
void tile_input_gradient(const float* m, int64_t ld, int64_t tiles, int64_t cols, const T* const* x, int64_t offset,
                         Affine affine, const T* const* source, T* const* out, float* sum_d, float* sum_dx) {
  constexpr int kPixels = Tile::kPixels, kPart = 16 / kPixels;
  columns(cols, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
    const floats<N> shift = load<N>(affine.shift + c);
    MaskSums<N> sums, part;
    for (int64_t t = 0; t < tiles; ++t) {
      if (t % kPart == 0) {
        sums.add(part);
        part = {};
      }
      floats<N> d[kPixels];
      Tile::template output<N>(m + t * ld + c, tiles * ld, d);
      for (int i = 0; i < kPixels; ++i) {
        const int64_t pixel = kPixels * t + i;
        if (!out[pixel]) continue;
        const floats<N> centred = load<N>(x[pixel] + offset + c) - mean;
        const floats<N> masked = centred * scale + shift <= 0 ? floats<N>{} : d[i];
        part.add(masked, centred);
        const floats<N> before = source ? load<N>(source[pixel] + offset + c) : floats<N>{};
        store<N>(out[pixel] + offset + c, before + scale * masked);
      }
    }
    sums.add(part);
    sums.add_to(sum_d + c, sum_dx + c);
  });
}

// G v, over three vectors into four
template <typename V>
inline void filter_line(V g0, V g1, V g2, V* out, int stride) {
  out[0] = g0;
  out[stride] = 0.5f * (g0 + g2 + g1);
  out[2 * stride] = 0.5f * (g0 + g2 - g1);
  out[3 * stride] = g2;
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
template <typename T, typename S>
void winograd_weight(const S* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width, bool turned,
                     uint32_t* out, int64_t position) {
  constexpr int64_t per_word = 4 / sizeof(T);
  using V = floats<kLanes>;
  FilterSquare<S> square;
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t channels = depth - k < kLanes ? depth - k : kLanes;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = cols - c < 0 ? 0 : cols - c < kLanes ? cols - c : kLanes;
      square.load_from(filters + k * strides.in + c * strides.out, strides, channels, count);
      for (int64_t step = 0; step * per_word < channels; ++step) {
        V u[2][16] = {};
        for (int64_t half = 0; half < per_word && step * per_word + half < channels; ++half) {
          const V* taps = square.taps[step * per_word + half];
          V g[9], rows[12];
          for (int i = 0; i < 9; ++i) g[i] = taps[turned ? 8 - i : i];
          for (int j = 0; j < 3; ++j) filter_line(g[j], g[3 + j], g[6 + j], rows + j, 3);
          for (int i = 0; i < 4; ++i) filter_line(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], u[half] + 4 * i, 1);
        }
        for (int i = 0; i < 16; ++i) {
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

// G^T v, over four vectors into three
template <typename V>
inline void filter_gradient_line(V u0, V u1, V u2, V u3, V* out, int stride) {
  const V sum = 0.5f * (u1 + u2);
  out[0] = u0 + sum;
  out[stride] = 0.5f * (u1 - u2);
  out[2 * stride] = u3 + sum;
}

// dg = G^T u G for `cols` filters from u [16, cols] with rows `position` apart
inline void winograd_weight_gradient(const float* u, int64_t position, int64_t cols, float* out, int64_t col_stride,
                                     int64_t tap_stride) {
  columns(cols, [&]<int N>(int64_t c) {
    floats<N> v[16], rows[12], g[9];
    for (int i = 0; i < 16; ++i) v[i] = load<N>(u + i * position + c);
    for (int j = 0; j < 4; ++j) filter_gradient_line(v[j], v[4 + j], v[8 + j], v[12 + j], rows + j, 4);
    for (int i = 0; i < 3; ++i) {
      filter_gradient_line(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], g + 3 * i, 1);
    }
    if (col_stride == 1) {
      for (int i = 0; i < 9; ++i) store<N>(out + c + i * tap_stride, g[i]);
    } else {
      for (int j = 0; j < N; ++j) {
        for (int i = 0; i < 9; ++i) out[(c + j) * col_stride + i * tap_stride] = g[i][j];
      }
    }
  });
}

template <typename T>
constexpr TileKernels<T> winograd_kernels() {
  return {.weight = winograd_weight<T, T>,
          .weight_floats = winograd_weight<T, float>,
          .weight_to_floats = winograd_weight<float, T>,
          .input_to_floats = winograd_input<T, float>,
          .input = winograd_input<T, T>,
          .gradient = winograd_gradient<T>,
          .output = tile_output<T, Square>,
          .input_gradient = tile_input_gradient<T, Square>,
          .weight_gradient = winograd_weight_gradient};
}

}  // namespace
}  // namespace densenet_fast
