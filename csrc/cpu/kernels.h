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
};

template <typename T>
struct Kernels {
  // out = relu(y), [rows, cols] contiguous
  void (*bn_relu)(const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out);
  // mean = column means, m2 = sums of squared deviations from them
  void (*statistics)(const T* x, int64_t ld, int64_t rows, int64_t cols, float* mean, float* m2);
  // D = grad * (y > 0): sum_d += sum D, sum_dx += sum D * (x - mean), grad (contiguous) = scale * D
  void (*mask)(T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, float* sum_d, float* sum_dx);
  // the same, with total [rows, cols] (row distance total_ld) += scale * D unless null and
  // a (contiguous) = relu(y) unless null; grad is left as it is
  void (*mask_accumulate)(const T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* total,
                          int64_t total_ld, T* a, float* sum_d, float* sum_dx);
  // out (contiguous) = grad + p + q * (x - mean)
  void (*finalise)(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                   const float* mean, const float* p, const float* q, T* out);
  // out = factor * sum of relu(y) over `count` rows, [cols]
  void (*bn_relu_sum)(const T* const* rows, int64_t count, int64_t cols, Affine affine, float factor, T* out);
  // one row: D = factor * grad * (y > 0): sum_d += D, sum_dx += D * (x - mean), out = scale * D
  void (*mask_row)(const T* grad, const T* x, int64_t cols, Affine affine, float factor, T* out, float* sum_d,
                   float* sum_dx);
  // total += values, [count]
  void (*add)(const T* values, int64_t count, float* total);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<bf16> b16;
};

// The kernels for the best instruction set that this processor and its operating system allow, or for the one that the
// environment variable DENSENET_FAST_CPU names ("default", "avx2", "avx512"); read once.
const KernelTable& kernels();

}  // namespace densenet_fast
