// The convolution of kernel size 3 along lines, as tiles of one pixel: y = sum over the three taps of g . d, all per
// pair of channels. Nothing is transformed; a pixel's products with each tap are matrix products over channels, as
// winograd.h's are.
//
// Example:
//
//   const TileKernels<float> kernel = line_kernels<float>();  // Kernels<float>::line
//   kernel.input(around, 0, tiles, 64, &affine, {values, tiles * 64, 64, false});  // values [1, tiles, 64] = relu(y)
//   // m [1, tiles, 32]: three products of values, one for each tap, added up
//   kernel.output(m, 32, tiles, 32, nullptr, inside);
#pragma once

#include "winograd.h"

namespace densenet_fast {
namespace {

struct Point {
  static constexpr int kPixels = 1;

  template <int N>
  static void output(const float* m, int64_t, floats<N>* y) {
    y[0] = load<N>(m);
  }
};

template <typename T, typename To>
void line_input(const T* const* pixels, int64_t offset, int64_t tiles, int64_t cols, const Affine* affine,
                TransformedTiles<To> out) {
  if (affine == nullptr) {
    transform_tiles<1>(tiles, cols, out, [&]<int N>(int64_t c) {
      return [=](int64_t t, auto emit) { emit(0, pixels[t] ? load<N>(pixels[t] + offset + c) : floats<N>{}); };
    });
    return;
  }
  transform_tiles<1>(tiles, cols, out, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(*affine, c);
    return [=](int64_t t, auto emit) {
      const T* x = pixels[t];
      emit(0, x ? relu(bn(load<N>(x + offset + c))) : floats<N>{});
    };
  });
}

template <typename T>
void line_gradient(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<T> out) {
  line_input<T, T>(pixels, 0, tiles, cols, nullptr, out);
}

template <typename T, typename S>
void line_weight(const S* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width, bool,
                 uint32_t* out, int64_t) {
  constexpr int64_t per_word = 4 / sizeof(T);
  for (int64_t k = 0; k < depth; k += per_word, out += width) {
    for (int64_t j = 0; j < width; ++j) {
      const auto filter = [&](int64_t i) {
        return j < cols && i < depth ? load<1>(filters + i * strides.in + j * strides.out) : floats<1>{};
      };
      if constexpr (per_word == 1) {
        store_bits(out + j, filter(k));
      } else {
        store_bits(out + j, pair<1>(filter(k), filter(k + 1)));
      }
    }
  }
}

inline void line_weight_gradient(const float* u, int64_t, int64_t cols, float* out, int64_t col_stride, int64_t) {
  for (int64_t c = 0; c < cols; ++c) out[c * col_stride] = u[c];
}

template <typename T>
constexpr TileKernels<T> line_kernels() {
  return {.weight = line_weight<T, T>,
          .weight_floats = line_weight<T, float>,
          .weight_to_floats = line_weight<float, T>,
          .input_to_floats = line_input<T, float>,
          .input = line_input<T, T>,
          .gradient = line_gradient<T>,
          .output = tile_output<T, Point>,
          .input_gradient = tile_input_gradient<T, Point>,
          .weight_gradient = line_weight_gradient};
}

}  // namespace
}  // namespace densenet_fast
