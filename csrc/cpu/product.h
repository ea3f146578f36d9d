// The product of a row tile with a panel of at most 32 columns: registers hold a block of the result, and each step
// adds one outer product to it. A step sums over one float, or over two bf16 in one 32-bit word, always into floats.
//
// Example:
//
//   // out [28, 32] = a [28, 64] * b [64, 32] in float32, all contiguous; a and b as words
//   product<float>({a, 64, 1}, {b, 0, 32}, 28, 32, 64, out, 32, false);
#pragma once

#include "transpose.h"
#include "vectors.h"

namespace densenet_fast {
namespace {

constexpr int kBlockRows = kLanes == 16 ? 14 : 6;
using Floats = floats<kLanes>;
using WordLanes = Lanes<kLanes>::words;

template <typename To, typename From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline WordLanes load_words(const uint32_t* p) {
  WordLanes v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// sum + a * b, with one word of `a` for all lanes
template <typename T>
inline Floats add_product(Floats sum, uint32_t a, WordLanes b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
#endif
  return sum + same_bits<float>(a) * same_bits<Floats>(b);
}

// Every loop over the sums is unrolled, or they would live in memory. What is accumulated on is added last, so that
// rounding grows with the number of calls and not with all steps.
template <typename T, int ROWS, int VECTORS, bool ACCUMULATE>
void block(Operand a, Operand b, int64_t steps, float* out, int64_t ld) {
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Floats{};
  }
  for (int64_t part = 0; part < a.parts; ++part, a.words += a.part, b.words += steps * b.step) {
    for (int64_t k = 0; k < steps; ++k) {
      WordLanes columns[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) columns[j] = load_words(b.words + k * b.step + j * kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < ROWS; ++i) {
        const uint32_t row = a.words[i * a.row + k * a.step];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = add_product<T>(sum[i][j], row, columns[j]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      float* to = out + i * ld + j * kLanes;
      store<kLanes>(to, ACCUMULATE ? load<kLanes>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

template <typename T, int ROWS, int VECTORS>
inline void block_of(int64_t rows, Operand a, Operand b, int64_t steps, float* out, int64_t ld, bool accumulate) {
  if (rows == ROWS) {
    return accumulate ? block<T, ROWS, VECTORS, true>(a, b, steps, out, ld)
                      : block<T, ROWS, VECTORS, false>(a, b, steps, out, ld);
  }
  if constexpr (ROWS > 1) block_of<T, ROWS - 1, VECTORS>(rows, a, b, steps, out, ld, accumulate);
}

// of VECTORS vectors' columns from the first
template <typename T, int VECTORS>
inline void product_of_columns(Operand a, Operand b, int64_t rows, int64_t steps, float* out, int64_t ld,
                               bool accumulate) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, larger = rows % blocks;
  int64_t n = rows / blocks + 1;
  for (int64_t i = 0; i < blocks; ++i, a.words += n * a.row, out += n * ld) {
    if (i == larger) --n;
    block_of<T, kBlockRows, VECTORS>(n, a, b, steps, out, ld, accumulate);
  }
}

template <typename T>
void product(Operand a, Operand b, int64_t rows, int64_t cols, int64_t steps, float* out, int64_t ld, bool accumulate) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    product_of_columns<T, 2>(a, {b.words + c, b.row, b.step}, rows, steps, out + c, ld, accumulate);
  }
  for (; c < cols; c += kLanes) {
    product_of_columns<T, 1>(a, {b.words + c, b.row, b.step}, rows, steps, out + c, ld, accumulate);
  }
}

#if !defined(__AVX512BF16__)
// [2 * steps, count] floats from words [steps, count]
inline void unpack(const uint32_t* words, int64_t step, int64_t steps, int64_t count, uint32_t* out) {
  for (int64_t k = 0; k < steps; ++k, words += step, out += 2 * count) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = words[j] << 16;
      out[count + j] = words[j] & 0xffff0000;
    }
  }
}

// [2 * steps] floats from [steps] words
inline void unpack_row(const uint32_t* words, int64_t steps, uint32_t* out) {
  const bf16* values = reinterpret_cast<const bf16*>(words);
  columns(2 * steps, [&]<int N>(int64_t c) { store_bits(out + c, load<N>(values + c)); });
}

// Where no instruction multiplies bf16, products of parts that stay in the first-level cache as floats
template <>
void product<bf16>(Operand a, Operand b, int64_t rows, int64_t cols, int64_t steps, float* out, int64_t ld,
                   bool accumulate) {
  constexpr int64_t kRows = 48, kSteps = 64;
  alignas(64) uint32_t left[kRows * 2 * kSteps], right[2 * kSteps * 32];
  for (int64_t k = 0; k < steps; k += kSteps) {
    const int64_t depth = steps - k < kSteps ? steps - k : kSteps;
    unpack(b.words + k * b.step, b.step, depth, cols, right);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t n = rows - r < kRows ? rows - r : kRows;
      const uint32_t* words = a.words + r * a.row + k * a.step;
      const bool by_row = a.step == 1;
      if (by_row) {
        for (int64_t i = 0; i < n; ++i) unpack_row(words + i * a.row, depth, left + i * 2 * depth);
      } else {
        unpack(words, a.step, depth, n, left);
      }
      product<float>({left, by_row ? 2 * depth : 1, by_row ? 1 : n}, {right, 0, cols}, n, cols, 2 * depth, out + r * ld,
                     ld, accumulate || k > 0);
    }
  }
}
#endif

constexpr int64_t kPackAhead = 512;  // bytes

// word(k, j) = value k, or the pair 2k and 2k + 1, of column j; zero past the last value and up to `width` columns
template <typename T>
void pack(const T* values, int64_t depth_stride, int64_t col_stride, int64_t depth, int64_t cols, int64_t width,
          uint32_t* out) {
  constexpr int64_t per_word = 4 / sizeof(T);
  const int64_t steps = (depth + per_word - 1) / per_word;
  int64_t done = 0, side = 0;  // words and columns that are transposed in squares
  // the words of columns from `column` and of values up to `end`, from word `first`
  const auto pack_words = [&](int64_t stride, int64_t first, int64_t end, int64_t column) {
    for (int64_t k = first; k * per_word < end; ++k) {
      const T* low = values + k * per_word * stride;
      for (int64_t j = column; j < cols; ++j) {
        const T* value = low + j * col_stride;
        if constexpr (per_word == 1) {
          out[k * width + j] = same_bits<uint32_t>(*value);
        } else {
          const uint32_t high = k * per_word + 1 < end ? value[stride].bits : 0;
          out[k * width + j] = value->bits | high << 16;
        }
      }
    }
  };
  if (depth_stride == 1) {
    done = depth / per_word / kLanes * kLanes;
    side = cols / kLanes * kLanes;
    for (int64_t j = 0; j < side; j += kLanes) {
      for (int64_t k = 0; k < done; k += kLanes) {
        WordLanes square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const T* from = values + (j + i) * col_stride + k * per_word;
          __builtin_prefetch(from + kPackAhead / sizeof(T));
          __builtin_memcpy(&square[i], from, sizeof(WordLanes));
        }
        transpose_square(square);
        for (int i = 0; i < kLanes; ++i) store_bits(out + (k + i) * width + j, square[i]);
      }
    }
    pack_words(1, 0, done * per_word, side);
  }
  pack_words(depth_stride, done, depth, 0);
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t j = cols; j < width; ++j) out[k * width + j] = 0;
  }
}

}  // namespace
}  // namespace densenet_fast
