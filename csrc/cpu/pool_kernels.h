// The kernels of the stem and the head, which pool what they normalise; conventions as in kernels.h.
//
// Example:
//
//   const PoolKernels<float>& kernel = pool_kernels().f32;
//   float total[64] = {};
//   kernel.bn_relu_total({x, 64}, 49, 64, {mean, scale, shift}, total);  // over the 49 pixels of an image, x [49, 64]
//   kernel.scaled(total, 64, 1.0f / 49, out);                            // out [64] = their mean
#pragma once

#include "kernels.h"

namespace densenet_fast {

// A maximum over windows of 3 at distance 2, padded by 1, works on lines: the pixels that follow each other along the
// last dimension. Output o of a line reads the pixels u = 2 * o - 1 + i, i = 0, 1, 2, that exist in each of up to nine
// lines; a position in its window is i plus the line's `place`.
template <typename T>
struct Lines {
  static constexpr int kMost = 9;
  int64_t count = 0;
  const T* data[kMost];  // [width, cols] each
  uint8_t places[kMost];
};

// The output lines that read a line of pixels: their gradients, their maxima's positions, and the pixels' place in each
template <typename T>
struct Readers : Lines<T> {
  const uint8_t* argmaxes[Lines<T>::kMost];  // [(width + 1) / 2, cols] each
};

template <typename T>
struct PoolKernels {
  // one output line: out = maximum of relu(y) over the window, argmax = its position: the first of equals, a NaN before
  // all numbers; both [(width + 1) / 2, cols], contiguous
  void (*bn_relu_max)(const Lines<T>& lines, int64_t ld, int64_t width, int64_t cols, Affine affine, T* out,
                      uint8_t* argmax);
  // one output line: out [(width + 1) / 2, cols] = maximum over the window of lines that are not negative; a NaN is
  // more than all numbers
  void (*max)(const Lines<T>& lines, int64_t ld, int64_t width, int64_t cols, Rows<T> out);
  // one line of pixels x [width, cols]: D = (sum of the gradients of the outputs whose maximum it is) * (y > 0):
  // out [width, cols], contiguous, = scale * D, and the sums of D
  void (*mask_max)(const Readers<T>& readers, int64_t grad_ld, Rows<const T> x, int64_t width, int64_t cols,
                   Affine affine, T* out, GradientSums sums);
  // total [cols] += sums of relu(y) over the rows
  void (*bn_relu_total)(Rows<const T> x, int64_t rows, int64_t cols, Affine affine, float* total);
  // D = factor * grad * (y > 0) with the same grad [cols] in every row: out [rows, cols], contiguous, = scale * D, and
  // the sums of D
  void (*mask_average)(const T* grad, float factor, Rows<const T> x, int64_t rows, int64_t cols, Affine affine, T* out,
                       GradientSums sums);
  // out [count] = factor * values [count]
  void (*scaled)(const float* values, int64_t count, float factor, T* out);
};

struct PoolKernelTable {
  PoolKernels<float> f32;
  PoolKernels<bf16> b16;
};

// For the instruction set of kernels()
const PoolKernelTable& pool_kernels();

}  // namespace densenet_fast
