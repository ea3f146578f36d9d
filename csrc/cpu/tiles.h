// What the ops of the CPU backend share: matrices over torch's tensors, the division of the rows among torch's threads and
// into tiles that stay in cache, and the sums and statistics of tiles.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
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

  T* row(int64_t r) const { return data + r * ld; }
};

inline const float* vector(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  ": expected ", size, " contiguous float32 values");
  return static_cast<const float*>(t.data_ptr());
}

inline Affine affine(const Tensor& mean, const Tensor& scale, const Tensor& shift, int64_t cols) {
  return {vector(mean, cols, "mean"), vector(scale, cols, "scale"), vector(shift, cols, "shift")};
}

template <typename T>
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  T* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  return {memory, &std::free};
}

inline std::vector<float> zeros(int64_t count) { return std::vector<float>(count, 0.0f); }

// `rows` divided evenly into one chunk per thread, and each chunk into tiles whose scratch stays in the core's cache. The
// division, and with it every rounding, depends on nothing but the shape and the number of threads.
struct Tiles {
  int64_t rows, chunks, per_chunk;

  Tiles(int64_t rows, int64_t scratch_bytes_per_row) : rows(rows) {
    constexpr int64_t kScratchBytes = 384 << 10;
    const int64_t tile = std::clamp<int64_t>(kScratchBytes / std::max<int64_t>(scratch_bytes_per_row, 1), 32, 1024);
    const int64_t wanted = std::max<int64_t>((rows + tile - 1) / tile, 1);
    chunks = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(rows / 16, 1));
    per_chunk = (wanted + chunks - 1) / chunks;
  }

  int64_t count() const { return chunks * per_chunk; }
  int64_t begin(int64_t tile) const { return rows * tile / count(); }
  int64_t largest() const { return rows / count() + 1; }

  // f(chunk) in parallel; a chunk's tiles are chunk * per_chunk ... (chunk + 1) * per_chunk
  template <typename F>
  void run(F f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  }

  // f(tile, first row, rows) in parallel
  template <typename F>
  void each(F f) const {
    run([&](int64_t chunk) {
      for (int64_t tile = chunk * per_chunk; tile < (chunk + 1) * per_chunk; ++tile) {
        const int64_t first = begin(tile), n = begin(tile + 1) - first;
        if (n > 0) f(tile, first, n);
      }
    });
  }
};

// (sum D, sum D * (x - mean)) of one chunk of tiles: each tile's by itself, then added, so that rounding does not grow with
// the number of rows
struct ColumnSums {
  int64_t cols = 0;
  std::vector<float> sums, tile;

  void reset(int64_t columns) {
    cols = columns;
    sums = zeros(2 * cols);
  }

  // f(sum_d, sum_dx) adds a tile's sums to zeros
  template <typename F>
  void add(F f) {
    tile.assign(2 * cols, 0.0f);
    f(tile.data(), tile.data() + cols);
    kernels().f32.add(tile.data(), 2 * cols, sums.data());
  }
};

// Column statistics per tile, combined pairwise in the order of the tiles (Chan, Golub and LeVeque 1983)
struct TileStatistics {
  int64_t cols;
  std::vector<float> means, m2s;

  TileStatistics(const Tiles& tiles, int64_t cols)
      : cols(cols), means(zeros(tiles.count() * cols)), m2s(zeros(tiles.count() * cols)) {}

  template <typename T>
  void add(int64_t tile, const T* x, int64_t ld, int64_t rows) {
    kernels_of<T>().statistics(x, ld, rows, cols, &means[tile * cols], &m2s[tile * cols]);
  }

  std::tuple<Tensor, Tensor> combined(const Tiles& tiles, const Tensor& like) const {
    Tensor mean = torch::stable::new_empty(like, {cols}, ScalarType::Float);
    Tensor var = torch::stable::new_empty(like, {cols}, ScalarType::Float);
    float* mean_data = static_cast<float*>(mean.data_ptr());
    float* var_data = static_cast<float*>(var.data_ptr());
    for (int64_t c = 0; c < cols; ++c) {
      double count = 0, centre = 0, m2 = 0;
      for (int64_t tile = 0; tile < tiles.count(); ++tile) {
        const double n = tiles.begin(tile + 1) - tiles.begin(tile);
        if (n == 0) continue;
        const double delta = means[tile * cols + c] - centre, total = count + n;
        m2 += m2s[tile * cols + c] + delta * delta * count * n / total;
        centre += delta * n / total;
        count = total;
      }
      mean_data[c] = centre;
      var_data[c] = m2 / count;
    }
    return {mean, var};
  }
};

template <typename T>
Tensor blob(const T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return torch::stable::from_blob(const_cast<T*>(data), {rows, cols}, {row_stride, col_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kDtype<T>);
}

// out = a @ b; a thread of torch's pool computes it alone
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Sums the chunks' accumulators in their order
inline Tensor total(const std::vector<std::vector<float>>& parts, torch::headeronly::IntHeaderOnlyArrayRef size,
             const Tensor& like) {
  Tensor sum = torch::stable::new_empty(like, size, ScalarType::Float);
  float* data = static_cast<float*>(sum.data_ptr());
  std::copy(parts[0].begin(), parts[0].end(), data);
  for (size_t i = 1; i < parts.size(); ++i) kernels().f32.add(parts[i].data(), parts[i].size(), data);
  return sum;
}

inline Tensor total(const std::vector<ColumnSums>& parts, const Tensor& like) {  // [2, cols]
  std::vector<std::vector<float>> sums;
  for (const ColumnSums& part : parts) sums.push_back(part.sums);
  return total(sums, {2, parts[0].cols}, like);
}

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

template <typename F>
auto by_dtype(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "expected float32 or bfloat16");
  return x.scalar_type() == ScalarType::Float ? f(float()) : f(bf16());
}

}  // namespace densenet_fast
