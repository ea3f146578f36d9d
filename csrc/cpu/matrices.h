// Torch's tensors as the kernels take them: matrices and vectors, checked; the kernels for a dtype; memory to work in.
//
// Example:
//
//   by_dtype(x, [&](auto zero) {
//     using T = decltype(zero);                             // float or bf16
//     const Matrix<const T> m(x, "x");                      // or an error: expected a matrix of adjacent columns
//     const Matrix<T> result(out, "out");
//     const Affine a = affine(mean, scale, shift, m.cols);  // or an error: expected float32 [cols]
//     kernels_of<T>().bn_relu(m.from(0), m.rows, m.cols, a, result.from(0));
//   });
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pool_kernels.h"

namespace densenet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
constexpr ScalarType kDtype<bf16> = ScalarType::BFloat16;

template <typename T>
const Kernels<T>& kernels_of();
template <>
inline const Kernels<float>& kernels_of() {
  return kernels().f32;
}
template <>
inline const Kernels<bf16>& kernels_of() {
  return kernels().b16;
}

template <typename T>
const PoolKernels<T>& pool_kernels_of();
template <>
inline const PoolKernels<float>& pool_kernels_of() {
  return pool_kernels().f32;
}
template <>
inline const PoolKernels<bf16>& pool_kernels_of() {
  return pool_kernels().b16;
}

// A matrix with adjacent columns, [rows, cols] and `ld` elements from row to row
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols, ld;

  Matrix(const Tensor& t, const char* name) : rows(t.size(0)), cols(t.size(1)), ld(t.stride(0)) {
    STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || cols <= 1), name, ": expected a matrix of adjacent columns");
    STD_TORCH_CHECK(t.scalar_type() == kDtype<std::remove_const_t<T>>, name, ": dtype unlike the others'");
    data = static_cast<T*>(t.data_ptr());
  }

  Matrix(T* data, int64_t rows, int64_t cols, int64_t ld) : data(data), rows(rows), cols(cols), ld(ld) {}

  T* row(int64_t r) const { return data + r * ld; }
  Rows<T> from(int64_t r, int64_t c = 0) const { return {row(r) + c, ld}; }

  Matrix columns(int64_t first, int64_t count) const { return {data + first, rows, count, ld}; }
  Matrix<const T> readonly() const { return {data, rows, cols, ld}; }
};

template <typename T, typename U>
void check_shape(const Matrix<T>& m, const Matrix<U>& x, const char* name) {
  STD_TORCH_CHECK(m.rows == x.rows && m.cols == x.cols, name, ": expected x's shape");
}

// The spatial dimensions of a grid (N, *spatial) of so many pixels
inline int64_t spatial_dims(const std::vector<int64_t>& grid, int64_t rows) {
  const int64_t dims = static_cast<int64_t>(grid.size()) - 1;
  const int64_t pixels = std::accumulate(grid.begin(), grid.end(), int64_t{1}, std::multiplies<>());
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "grid: expected one to three spatial sizes");
  STD_TORCH_CHECK(pixels == rows, "grid: expected the product ", rows, ", got ", pixels);
  return dims;
}

// [size] float32
inline const float* vector(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  ": expected ", size, " contiguous float32 values");
  return static_cast<const float*>(t.data_ptr());
}

inline const float* vector(const std::optional<Tensor>& t, int64_t size, const char* name) {
  return t ? vector(*t, size, name) : nullptr;
}

// One that is written
inline float* output(const Tensor& t, int64_t size, const char* name) {
  return const_cast<float*>(vector(t, size, name));
}

inline Affine affine(const Tensor& mean, const Tensor& scale, const Tensor& shift, int64_t cols) {
  return {vector(mean, cols, "mean"), vector(scale, cols, "scale"), vector(shift, cols, "shift")};
}

inline std::optional<Affine> optional_affine(const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                             const std::optional<Tensor>& shift, int64_t cols) {
  STD_TORCH_CHECK(mean.has_value() == scale.has_value() && mean.has_value() == shift.has_value(),
                  "mean: expected with scale and shift");
  return mean ? std::optional(affine(*mean, *scale, *shift, cols)) : std::nullopt;
}

template <typename T>
const T* or_null(const std::optional<T>& value) {
  return value ? &*value : nullptr;
}

template <typename T>
using Scratch = std::unique_ptr<T[], decltype(&free_scratch)>;

template <typename T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  void* memory = kept_scratch(bytes);
  if (memory == nullptr) memory = std::aligned_alloc(64, bytes);
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  return {static_cast<T*>(memory), &free_scratch};
}

// Asks for large pages: rows that are far apart otherwise miss the processor's table of pages at every step
template <typename T>
void advise_huge_pages(const Matrix<T>& m) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(m.data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(m.row(m.rows)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor new_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

inline Tensor nothing(const Tensor& like) { return new_floats(like, {0}); }

inline float* floats_of(Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline std::vector<float> zeros(int64_t count) { return std::vector<float>(count, 0.0f); }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename F>
auto by_dtype(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "expected float32 or bfloat16");
  return x.scalar_type() == ScalarType::Float ? f(float()) : f(bf16());
}

}  // namespace densenet_fast
