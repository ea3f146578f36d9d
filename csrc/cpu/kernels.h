// The row-tile kernels of the CPU backend, as plain functions on pointers. A tile is `rows` rows of `cols` adjacent
// columns; `ld` is the distance between rows in elements. Compiled once per instruction set (kernels.cpp).
#pragma once

#include <cstdint>

namespace densenet_fast {

// bfloat16 bits
struct bf16 {
  uint16_t bits;
};

// y = (x - mean) * scale + shift, one value per column
struct Affine {
  const float* mean;   // [cols]
  const float* scale;  // [cols]
  const float* shift;  // [cols]

  Affine from(int64_t col) const { return {mean + col, scale + col, shift + col}; }
};

// A matrix of 32-bit words, each a float or two bf16 that are adjacent in the direction that a product sums over
// ("steps")
struct Operand {
  const uint32_t* words;
  int64_t row, step;  // distance from row to row (unused for a panel, whose columns are adjacent) and from step to step
};

// Distances in elements between filters of neighbouring input channels (which a product sums over), of neighbouring
// output channels, and between a filter's taps
struct FilterStrides {
  int64_t in, out, tap;
};

// The values of each tile, [values, tiles, columns] from `position` to position and `row` to row in elements; if
// paired, bf16 of two tiles share a word
template <typename T>
struct TransformedTiles {
  T* data;
  int64_t position, row;
  bool paired;
};

// What the convolution of kernel size 3 does to tiles and to filters before and after its products. `pixels` are of all
// tiles, a tile's adjacent, null outside the image.
template <typename T>
struct TileKernels {
  // word(value, k, j) of the transformed filters, turned by 180 degrees if `turned`; zero past the last filter and up
  // to `width`, a multiple of 16
  void (*weight)(const T* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width, bool turned,
                 uint32_t* out, int64_t position);
  void (*weight_floats)(const float* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width,
                        bool turned, uint32_t* out, int64_t position);
  void (*weight_to_floats)(const T* filters, FilterStrides strides, int64_t depth, int64_t cols, int64_t width,
                           bool turned, uint32_t* out, int64_t position);
  // of relu(y), or of x without an affine
  void (*input_to_floats)(const T* const* pixels, int64_t offset, int64_t tiles, int64_t cols, const Affine* affine,
                          TransformedTiles<float> out);
  void (*input)(const T* const* pixels, int64_t offset, int64_t tiles, int64_t cols, const Affine* affine,
                TransformedTiles<T> out);
  // of the result's gradient, for the filters'
  void (*gradient)(const T* const* pixels, int64_t tiles, int64_t cols, TransformedTiles<T> out);
  // the result from m [values, tiles, ld]
  void (*output)(const float* m, int64_t ld, int64_t tiles, int64_t cols, const float* bias, T* const* pixels);
  // D = (the result of m) * (y > 0) at the pixels of x: out = source + scale * D, sum_d += sum D,
  // sum_dx += sum D * (x - mean)
  void (*input_gradient)(const float* m, int64_t ld, int64_t tiles, int64_t cols, const T* const* x, int64_t offset,
                         Affine affine, const T* const* source, T* const* out, float* sum_d, float* sum_dx);
  // of `cols` filters from u [values, cols] with rows `position` apart
  void (*weight_gradient)(const float* u, int64_t position, int64_t cols, float* out, int64_t col_stride,
                          int64_t tap_stride);
};

template <typename T>
struct Kernels {
  // out = relu(y), [rows, cols]
  void (*bn_relu)(const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out, int64_t out_ld);
  // mean = column means, m2 = sums of squared deviations from them
  void (*statistics)(const T* x, int64_t ld, int64_t rows, int64_t cols, double* mean, double* m2);
  // D = grad * (y > 0): sum_d += sum D, sum_dx += sum D * (x - mean), out = scale * D; out may be grad
  void (*mask)(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine,
               T* out, int64_t out_ld, float* sum_d, float* sum_dx);
  // the same, with total [rows, cols] = source + scale * D unless null and a = relu(y) unless null, as a panel whose
  // steps are rows; with no grad, a alone; source may be total
  void (*mask_accumulate)(const float* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                          Affine affine, const T* source, int64_t source_ld, T* total, int64_t total_ld, uint32_t* a,
                          int64_t a_width, float* sum_d, float* sum_dx);
  // out = grad + p + q * (x - mean); out may be grad
  void (*finalise)(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                   const float* mean, const float* p, const float* q, T* out, int64_t out_ld);
  // x [rows, cols] *= mask * scale, where mask is 0 or 1
  void (*dropout)(T* x, int64_t ld, const uint8_t* mask, int64_t mask_ld, int64_t rows, int64_t cols, float scale);
  // out [rows, cols] = means of relu(y) over the `window` rows x[window * r], ..., from column `offset`; rest = what
  // their rounding lost, unless null
  void (*bn_relu_mean)(const T* const* x, int64_t offset, int64_t rows, int64_t window, int64_t cols, Affine affine,
                       T* out, T* rest, int64_t out_ld);
  // the backward pass of that: as mask_accumulate, with D = grad / window * (y > 0) at each of a window's rows, and
  // out = scale * D there
  void (*mask_windows)(const float* grad, int64_t grad_ld, const T* const* x, int64_t offset, int64_t rows,
                       int64_t window, int64_t cols, Affine affine, T* const* out, uint32_t* a, int64_t a_width,
                       float* sum_d, float* sum_dx);
  // scale = weight (unless null) / sqrt(var + eps), [cols]
  void (*fold)(const float* var, float eps, const float* weight, int64_t cols, float* scale);
  // total += values, [count]
  void (*add)(const T* values, int64_t count, float* total);
  // out = values + bias (unless null), [rows, cols], then normalised and rectified (unless null)
  void (*store_rows)(const float* values, int64_t values_ld, int64_t rows, int64_t cols, const float* bias,
                     const Affine* then, T* out, int64_t out_ld);
  // the words of a panel [steps, width], or of rows whose steps are adjacent in memory, from values anywhere
  void (*pack)(const T* values, int64_t depth_stride, int64_t col_stride, int64_t depth, int64_t cols, int64_t width,
               uint32_t* out);
  // out [rows, cols] = (or +=) a [rows, steps] * b [steps, cols]; cols is a multiple of 16, at most 32
  void (*product)(Operand a, Operand b, int64_t rows, int64_t cols, int64_t steps, float* out, int64_t ld,
                  bool accumulate);
  // unless null, product wants steps of a that are adjacent: copies a [rows, steps], whose rows are, to such
  void (*transpose)(Operand a, int64_t rows, int64_t steps, uint32_t* out);
  TileKernels<T> square, wide, line;  // of 2x2 and of 2x4 pixels (winograd.h), and of one (line.h)
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<bf16> b16;
  bool multiplies_bf16;  // in one instruction, and not as floats
  void (*release)();     // unless null, each thread calls it after its products
};

// The kernels for the best instruction set that this processor and its operating system allow, or for the one that the
// environment variable DENSENET_FAST_CPU names ("default", "avx2", "avx512", "avx512_bf16", "amx_bf16");
// read once.
const KernelTable& kernels();

}  // namespace densenet_fast
