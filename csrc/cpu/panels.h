// The operands of the matrix products: how they are packed, and what their results are summed in.
//
// Example:
//
//   const Panels panels(48, 64);  // for b [64, 48]: 32 columns and 16
//   for (int64_t p = 0; p < panels.count; ++p) {
//     kernels().f32.pack(b + 32 * p, 48, 1, 64, panels.valid(p), panels.width(p), panels.panel(p));
//     const int64_t width = panels.width(p);  // c [100, 48] = a [100, 64] * b
//     kernels().f32.product({as_words(a), 64, 1}, panels.operand(p), 100, width, 64, c + 32 * p, 48, false);
//   }
#pragma once

#include <algorithm>
#include <memory>

#include "matrices.h"

namespace densenet_fast {

constexpr int64_t kSkew = 16;  // words between rows of scratch, lest they fall into the same sets of the caches

// The right factor of a product, packed: panels of 32 columns, the last one of 16 or 32
struct Panels {
  int64_t cols, steps, count;
  Scratch<uint32_t> words;

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
  Scratch<uint32_t> copies;

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

// What one chunk sums over its tiles: the first one's values are stored, later ones' added
struct Accumulator {
  Scratch<float> values = {nullptr, &free_scratch};
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

}  // namespace densenet_fast
