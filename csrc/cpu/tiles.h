// What the ops of the CPU backend share: matrices over torch's tensors, the division of the rows among torch's threads
// and into tiles that stay in cache, and the sums and statistics of tiles.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
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

  Matrix(T* data, int64_t rows, int64_t cols, int64_t ld) : data(data), rows(rows), cols(cols), ld(ld) {}

  T* row(int64_t r) const { return data + r * ld; }

  Matrix columns(int64_t first, int64_t count) const { return {data + first, rows, count, ld}; }
  Matrix<const T> readonly() const { return {data, rows, cols, ld}; }
};

inline const float* vector(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == ScalarType::Float, name,
                  ": expected ", size, " contiguous float32 values");
  return static_cast<const float*>(t.data_ptr());
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
std::unique_ptr<T[], decltype(&std::free)> scratch(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  T* memory = static_cast<T*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "out of memory");
  return {memory, &std::free};
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

// Tiles that threads take from either end
class Remaining {
 public:
  void reset(int64_t begin, int64_t end) { range_ = pack(begin, end); }

  // -1 if there is none
  int64_t first() {
    return take([](uint32_t& begin, uint32_t&) { return begin++; });
  }
  int64_t last() {
    return take([](uint32_t&, uint32_t& end) { return --end; });
  }

 private:
  static uint64_t pack(uint32_t begin, uint32_t end) { return uint64_t{begin} << 32 | end; }

  template <typename F>
  int64_t take(F f) {
    uint64_t seen = range_;
    for (;;) {
      uint32_t begin = seen >> 32, end = seen;
      if (begin == end) return -1;
      const int64_t tile = f(begin, end);
      if (range_.compare_exchange_weak(seen, pack(begin, end))) return tile;
    }
  }

  alignas(64) std::atomic<uint64_t> range_{0};
};

// `rows` divided evenly into one chunk per thread, and each chunk into tiles whose scratch stays in the core's cache.
// The division, and with it every rounding, depends on nothing but the shape and the number of threads.
struct Tiles {
  int64_t rows, chunks, per_chunk;

  Tiles(int64_t rows, int64_t scratch_bytes_per_row)
      : Tiles(rows, std::clamp<int64_t>((384 << 10) / std::max<int64_t>(scratch_bytes_per_row, 1), 32, 1024), 16) {}

  // tiles of about `tile` rows, chunks of at least `least`
  Tiles(int64_t rows, int64_t tile, int64_t least) : rows(rows) {
    chunks = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(rows / least, 1));
    per_chunk = std::max<int64_t>((rows + tile * chunks - 1) / (tile * chunks), 1);
  }

  int64_t count() const { return chunks * per_chunk; }
  int64_t begin(int64_t tile) const { return rows * tile / count(); }
  int64_t largest() const { return (rows + count() - 1) / count(); }

  // What a thread's products hold of registers that other libraries use too is free again when it leaves them
  struct Release {
    ~Release() {
      if (kernels().release) kernels().release();
    }
  };

  // f(chunk) in parallel; a chunk's tiles are chunk * per_chunk ... (chunk + 1) * per_chunk
  template <typename F>
  void run(F f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const Release release;
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  }

  // f(each) in parallel, where each(g) calls g(tile, first row, rows) for tiles that nobody else has: the next of the
  // thread's own chunk or, when it has none left, the last of another's, whose thread is late. For tiles that nothing
  // is summed over.
  template <typename F>
  void share(F f) const {
    std::vector<Remaining> remaining(chunks);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) remaining[chunk].reset(chunk * per_chunk, (chunk + 1) * per_chunk);
    run([&](int64_t chunk) {
      f([&](auto g) {
        for (int64_t i = 0; i < chunks; ++i) {
          Remaining& tiles = remaining[(chunk + i) % chunks];
          for (int64_t tile; (tile = i == 0 ? tiles.first() : tiles.last()) >= 0;) {
            const int64_t row = begin(tile), n = begin(tile + 1) - row;
            if (n > 0) g(tile, row, n);
          }
        }
      });
    });
  }

  // f(tile, first row, rows) in parallel, a chunk's tiles in their order
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

// (sum D, sum D * (x - mean)) of one chunk of tiles: each tile's by itself, then added in double, so that rounding does
// not grow with the number of rows
struct ColumnSums {
  int64_t cols = 0;
  std::vector<double> sums;
  std::vector<float> tile;

  void reset(int64_t columns) {
    cols = columns;
    sums.assign(2 * cols, 0.0);
  }

  // f(sum_d, sum_dx) adds a tile's sums to zeros
  template <typename F>
  void add(F f) {
    tile.assign(2 * cols, 0.0f);
    f(tile.data(), tile.data() + cols);
    for (int64_t i = 0; i < 2 * cols; ++i) sums[i] += tile[i];
  }
};

// Where statistics go: mean, biased variance and rstd = 1 / sqrt(var + eps), [cols] each
struct StatisticsOutput {
  float *mean, *var, *rstd, eps;

  StatisticsOutput(float* mean, float* var, float* rstd, float eps) : mean(mean), var(var), rstd(rstd), eps(eps) {}

  StatisticsOutput(const Tensor& mean, const Tensor& var, const Tensor& rstd, double eps, int64_t cols)
      : mean(output(mean, cols, "mean")), var(output(var, cols, "var")), rstd(output(rstd, cols, "rstd")), eps(eps) {}

  static float* output(const Tensor& t, int64_t cols, const char* name) {
    return const_cast<float*>(vector(t, cols, name));
  }
};

inline std::optional<StatisticsOutput> optional_statistics(const std::optional<Tensor>& mean,
                                                           const std::optional<Tensor>& var,
                                                           const std::optional<Tensor>& rstd, double eps,
                                                           int64_t cols) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value() && mean.has_value() == rstd.has_value(),
                  "out_mean: expected with out_var and out_rstd");
  return mean ? std::optional(StatisticsOutput(*mean, *var, *rstd, eps, cols)) : std::nullopt;
}

// What one chunk sums over its tiles: the first one's values are stored, later ones' added
struct Accumulator {
  std::unique_ptr<float[], decltype(&std::free)> values = {nullptr, &std::free};
  int64_t count = 0;
  bool started = false;

  void reset(int64_t size) {
    count = size;
    values = scratch<float>(size);
  }

  void finish() {
    if (!started) std::fill_n(values.get(), count, 0.0f);
  }
};

// Column statistics per tile, combined pairwise in the order of the tiles (Chan, Golub and LeVeque 1983)
struct TileStatistics {
  int64_t cols;
  std::vector<double> means, m2s;

  TileStatistics(const Tiles& tiles, int64_t cols)
      : cols(cols), means(tiles.count() * cols), m2s(tiles.count() * cols) {}

  template <typename T>
  void add(int64_t tile, const T* x, int64_t ld, int64_t rows) {
    kernels_of<T>().statistics(x, ld, rows, cols, &means[tile * cols], &m2s[tile * cols]);
  }

  // Of tiles of lines of `width` rows each
  void combine(const Tiles& tiles, const StatisticsOutput& out, int64_t width = 1) const {
    std::vector<double> centre(cols), m2(cols);
    double count = 0;
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      const double n = width * (tiles.begin(tile + 1) - tiles.begin(tile));
      if (n == 0) continue;
      const double share = n / (count + n), weight = count * share;
      const double *tile_means = &means[tile * cols], *tile_m2s = &m2s[tile * cols];
      for (int64_t c = 0; c < cols; ++c) {
        const double delta = tile_means[c] - centre[c];
        m2[c] += tile_m2s[c] + delta * delta * weight;
        centre[c] += delta * share;
      }
      count += n;
    }
    for (int64_t c = 0; c < cols; ++c) {
      out.mean[c] = centre[c];
      out.var[c] = m2[c] / count;
      out.rstd[c] = 1.0f / std::sqrt(out.var[c] + out.eps);
    }
  }
};

template <typename T>
void column_statistics(const Matrix<const T>& m, const StatisticsOutput& out) {
  const Tiles tiles(m.rows, m.cols * sizeof(T));
  TileStatistics result(tiles, m.cols);
  tiles.each([&](int64_t tile, int64_t first, int64_t n) { result.add(tile, m.row(first), m.ld, n); });
  result.combine(tiles, out);
}

constexpr int64_t kSkew = 16;  // words between rows of scratch, lest they fall into the same sets of the caches

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The right factor of a product, packed: panels of 32 columns, the last one of 16 or 32
struct Panels {
  int64_t cols, steps, count;
  std::unique_ptr<uint32_t[], decltype(&std::free)> words;

  Panels(int64_t cols, int64_t steps, int64_t matrices = 1)
      : cols(cols), steps(steps), count((cols + 31) / 32), words(scratch<uint32_t>(matrices * size())) {}

  // Other sizes in the same memory, no larger
  void reshape(int64_t columns, int64_t depth) {
    cols = columns;
    steps = depth;
    count = (columns + 31) / 32;
  }

  int64_t padded() const { return round_up(cols, 16); }
  int64_t size() const { return padded() * steps + kSkew; }  // words of one matrix
  int64_t width(int64_t panel) const { return std::min<int64_t>(padded() - 32 * panel, 32); }
  int64_t valid(int64_t panel) const { return std::min<int64_t>(cols - 32 * panel, 32); }
  uint32_t* panel(int64_t panel, int64_t matrix = 0) const {
    return words.get() + matrix * size() + 32 * panel * steps;
  }

  Operand operand(int64_t panel, int64_t matrix = 0) const { return {this->panel(panel, matrix), 0, width(panel)}; }

  // f(panel) in parallel
  template <typename F>
  void each(F f) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) f(panel);
    });
  }
};

template <typename T>
constexpr int64_t kPerWord = 4 / sizeof(T);

// Words that sum over `depth` values
template <typename T>
int64_t steps_of(int64_t depth) {
  return (depth + kPerWord<T> - 1) / kPerWord<T>;
}

// The left factors of products that lie in memory with their rows adjacent, or copies where the kernels need those
template <typename T>
struct TransposedFactor {
  int64_t size;
  std::unique_ptr<uint32_t[], decltype(&std::free)> copies;

  // as many as `count` of `size` words
  TransposedFactor(int64_t size, int64_t count = 1)
      : size(size), copies(scratch<uint32_t>(kernels_of<T>().transpose ? size * count : 0)) {}

  Operand of(const uint32_t* words, int64_t step, int64_t rows, int64_t steps, int64_t i = 0) const {
    const Operand a = {words, 1, step};
    if (!kernels_of<T>().transpose) return a;
    uint32_t* copy = copies.get() + i * size;
    kernels_of<T>().transpose(a, rows, steps, copy);
    return {copy, steps, 1};
  }
};

template <typename T>
const uint32_t* as_words(const T* values) {
  return reinterpret_cast<const uint32_t*>(values);
}

// (1): grad + (p + 2 * q * (x - mean)) / count, what reaches x through its batch statistics included
template <typename T>
struct Finalise {
  Matrix<const T> x;
  const float* mean;
  std::vector<float> constant, slope;

  Finalise(const Matrix<const T>& x, const float* mean, const float* p, const float* q, double count)
      : x(x), mean(mean), constant(x.cols), slope(x.cols) {
    for (int64_t c = 0; c < x.cols; ++c) {
      constant[c] = p[c] / count;
      slope[c] = 2 * q[c] / count;
    }
  }

  Finalise(const Tensor& x, const Tensor& mean, const Tensor& p, const Tensor& q, double count)
      : Finalise(Matrix<const T>(x, "x"), vector(mean, x.size(1), "mean"), vector(p, x.size(1), "p"),
                 vector(q, x.size(1), "q"), count) {}

  void check(const Matrix<const T>& grad) const {
    STD_TORCH_CHECK(grad.rows == x.rows && grad.cols == x.cols, "grad: expected x's shape");
  }

  void apply(const Matrix<const T>& grad, int64_t first, int64_t rows, T* out, int64_t out_ld) const {
    kernels_of<T>().finalise(grad.row(first), grad.ld, x.row(first), x.ld, rows, x.cols, mean, constant.data(),
                             slope.data(), out, out_ld);
  }
};

// Sums the chunks' accumulators in their order: [2, cols], whose rows are `ld` apart
inline void total(const ColumnSums* parts, int64_t chunks, float* sums, int64_t ld) {
  const int64_t cols = parts[0].cols;
  for (int64_t i = 0; i < 2 * cols; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk].sums[i];
    sums[i / cols * ld + i % cols] = sum;
  }
}

inline void total(const std::vector<ColumnSums>& parts, float* sums) {
  total(parts.data(), parts.size(), sums, parts[0].cols);
}

inline Tensor total(const std::vector<ColumnSums>& parts, const Tensor& like) {
  Tensor sums = new_floats(like, {2, parts[0].cols});
  total(parts, floats_of(sums));
  return sums;
}

template <typename F>
auto by_dtype(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "expected float32 or bfloat16");
  return x.scalar_type() == ScalarType::Float ? f(float()) : f(bf16());
}

}  // namespace densenet_fast
