// The row-tile kernels of the CPU backend, as plain functions on pointers: no torch, no threads. A tile is `rows` rows
// of `cols` adjacent columns. Compiled once per instruction set (kernels.cpp).
//
// Example:
//
//   const Kernels<float>& kernel = kernels().f32;              // of the best instruction set of this processor
//   const Affine affine = {mean, scale, shift};                // [64] each
//   kernel.bn_relu({x + 96, 256}, 100, 64, affine, {out, 64}); // of columns 96 ... 159 of x [100, 256]: out [100, 64]
//   double means[64], m2[64];
//   kernel.statistics({out, 64}, 100, 64, means, m2);
#pragma once

#include <cstdint>

namespace densenet_fast {

// bfloat16 bits
struct bf16 {
  uint16_t bits;
};

// [rows, cols] for the `rows` and `cols` that a kernel is told: adjacent columns, `ld` elements from row to row
template <typename T>
struct Rows {
  T* data;
  int64_t ld;
};

// Windows of `window` rows each, one window for each of the `rows` that a kernel is told
template <typename T>
struct WindowRows {
  T* const* pointers;      // [rows * window], each to a row
  int64_t offset, window;  // the first column that is read; the size
};

// y = (x - mean) * scale + shift, one value per column
struct Affine {
  const float* mean;   // [cols]
  const float* scale;  // [cols]
  const float* shift;  // [cols]

  Affine from(int64_t col) const { return {mean + col, scale + col, shift + col}; }
};

// What a backward kernel adds its column sums to
struct GradientSums {
  float* d;   // [cols], += sum D
  float* dx;  // [cols], += sum D * (x - mean)
};

// total = source + what a kernel computes
template <typename T>
struct Accumulated {
  Rows<const T> source;  // its data may be total's
  Rows<T> total;         // without data: not asked for
};

// A panel that a kernel writes, whose steps are its rows: [steps of rows, width] words
struct PanelRows {
  uint32_t* words;  // null: not asked for
  int64_t width;
};

// A matrix of 32-bit words, each a float or two bf16 that are adjacent in the direction that a product sums over
// ("steps")
struct Operand {
  const uint32_t* words;
  int64_t row, step;  // distance from row to row (unused for a panel, whose columns are adjacent) and from step to step
  int64_t parts = 1, part = 0;  // of a left factor of floats: its steps stand in parts, which are this far apart
};

// Distances in elements between filters of neighbouring input channels (which a product sums over), of neighbouring
// output channels, and between a filter's taps
struct FilterStrides {
  int64_t in, out, tap;
};

// The values of each tile; if paired, bf16 of two tiles share a word
template <typename T>
struct TransformedTiles {
  T* data;                // [values, tiles, cols]
  int64_t position, row;  // from value to value and from tile to tile in elements
  bool paired;
};

// The pixels of tiles [tiles * pixels of a tile], for the gradient of what a convolution reads; from column `offset` on
template <typename T>
struct GradientPixels {
  const T* const* x;
  const T* const* source;  // or null
  T* const* out;           // null where a tile reaches beyond the image
  int64_t offset;
};

// What the convolution of kernel size 3 does to tiles and to filters before and after its products. `pixels` [tiles *
// pixels of a tile] are pointers to rows of a matrix, a tile's adjacent, null outside the image.
template <typename T>
struct TileKernels {
  // word(value, k, j) of the transformed filters [depth, cols, taps], turned by 180 degrees if `turned`, into
  // out [values, steps of depth, width], `position` words from value to value; zero past the last filter and up to
  // `width`, a multiple of 16
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
  // the result from m [values, tiles, ld] and bias [cols] (or null)
  void (*output)(const float* m, int64_t ld, int64_t tiles, int64_t cols, const float* bias, T* const* pixels);
  // D = (the result of m [values, tiles, ld]) * (y > 0) at the pixels of x: out = source + scale * D, and the sums of D
  void (*input_gradient)(const float* m, int64_t ld, int64_t tiles, int64_t cols, GradientPixels<T> pixels,
                         Affine affine, GradientSums sums);
  // out [cols, taps] of `cols` filters, `col_stride` and `tap_stride` apart, from u [values, cols] with rows `position`
  // apart
  void (*weight_gradient)(const float* u, int64_t position, int64_t cols, float* out, int64_t col_stride,
                          int64_t tap_stride);
};

template <typename T>
struct Kernels {
  // out = relu(y)
  void (*bn_relu)(Rows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out);
  // mean [cols] = column means, m2 [cols] = sums of squared deviations from them
  void (*statistics)(Rows<const T> x, int64_t rows, int64_t cols, double* mean, double* m2);
  // D = grad * (y > 0): out = scale * D, and the sums of D; out may be grad
  void (*mask)(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out,
               GradientSums sums);
  // the same, with total = source + scale * D, and a = relu(y) as a panel; without grad's data, a alone
  void (*mask_accumulate)(Rows<const float> grad, Rows<const T> x, int64_t rows, int64_t cols, Affine affine,
                          Accumulated<T> to, PanelRows a, GradientSums sums);
  // out = grad + p + q * (x - mean), vectors of [cols]; out may be grad
  void (*finalise)(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t cols, const float* mean, const float* p,
                   const float* q, Rows<T> out);
  // x *= mask * scale, where mask is 0 or 1
  void (*dropout)(Rows<T> x, Rows<const uint8_t> mask, int64_t rows, int64_t cols, float scale);
  // out = means of relu(y) over the windows of x; rest = what their rounding lost, unless null, with out's ld
  void (*bn_relu_mean)(WindowRows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out, T* rest);
  // the backward pass of that: as mask_accumulate, with D = grad / window * (y > 0) at each of a window's rows, and
  // out [rows * window] = scale * D there, from x's offset on
  void (*mask_windows)(Rows<const float> grad, WindowRows<const T> x, int64_t rows, int64_t cols, Affine affine,
                       T* const* out, PanelRows a, GradientSums sums);
  // scale [cols] = weight [cols] (unless null) / sqrt(var [cols] + eps)
  void (*fold)(const float* var, float eps, const float* weight, int64_t cols, float* scale);
  // total [count] += values [count]
  void (*add)(const T* values, int64_t count, float* total);
  // out = values + bias [cols] (unless null), then normalised and rectified (unless null)
  void (*store_rows)(Rows<const float> values, int64_t rows, int64_t cols, const float* bias, const Affine* then,
                     Rows<T> out);
  // out [steps of depth, width] = the words of a panel, or of rows whose steps are adjacent in memory, from
  // values [depth, cols] anywhere
  void (*pack)(const T* values, int64_t depth_stride, int64_t col_stride, int64_t depth, int64_t cols, int64_t width,
               uint32_t* out);
  // out [rows, cols], `ld` from row to row, = (or +=) a [rows, steps] * b [steps, cols]; cols is a multiple of 16, at
  // most 32. With several parts of a, `steps` are those of a part.
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
