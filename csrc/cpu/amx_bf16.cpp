// What the instruction set "amx_bf16" adds to "avx512_bf16": the product of bf16 in tile registers.
//
// A register holds 16 x 16 words: sums [rows, columns], a part of a [rows, steps] or of b [steps, columns], whose
// panels have the order that the instruction wants. A block of the result is 2 x 2 registers of sums: the four loads of
// a step (8 cycles each on Sapphire Rapids, from the first-level cache) then take less time than its four products
// (16).
#include <immintrin.h>

#include "kernels.h"
#include "tile_registers.h"

namespace densenet_fast {
namespace {

constexpr int64_t kSide = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline __mmask16 first_lanes(int64_t count) { return (1u << larger(smaller(count, kSide), 0)) - 1; }

// A length in equal parts of at most kSide
struct Parts {
  int64_t count, size;

  explicit Parts(int64_t length)
      : count(larger((length + kSide - 1) / kSide, 1)), size(larger((length + count - 1) / count, 1)) {}
};

// The registers' shapes of this thread: sums 0 1 / 2 3, a 4 / 5, b 6 7. Loading them costs about as much as a small
// product, so they stay from product to product; release() ends that with the thread's share of an op, before anyone
// else, such as oneDNN, runs in it.
thread_local int64_t configured_rows = 0, configured_steps = 0;

void configure(int64_t rows, int64_t steps) {
  if (rows == configured_rows && steps == configured_steps) return;
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = i < 6 ? rows : steps;
    shapes.row_bytes[i] = 4 * (i == 4 || i == 5 ? steps : kSide);
  }
  tile_configure(shapes);
  configured_rows = rows;
  configured_steps = steps;
}

void release() {
  if (configured_rows > 0) tile_release();
  configured_rows = configured_steps = 0;
}

// out [kSide, cols] = from [rows, words], zero beyond
void copy_padded(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t* out, int64_t cols) {
  for (int64_t r = 0; r < kSide; ++r, out += cols) {
    for (int64_t c = 0; c < cols; c += kSide) {
      const __mmask16 valid = r < rows ? first_lanes(words - c) : 0;
      _mm512_store_si512(out + c, _mm512_maskz_loadu_epi32(valid, from + r * stride + c));
    }
  }
}

template <int DOWN, int ACROSS>
inline void add_products(const uint32_t* a0, const uint32_t* a1, int64_t a_row, const uint32_t* b, int64_t b_step) {
  tile_load<4>(a0, 4 * a_row);
  tile_load<6>(b, 4 * b_step);
  tile_multiply<0, 4, 6>();
  if constexpr (ACROSS > 1) {
    tile_load<7>(b + kSide, 4 * b_step);
    tile_multiply<1, 4, 7>();
  }
  if constexpr (DOWN > 1) {
    tile_load<5>(a1, 4 * a_row);
    tile_multiply<2, 5, 6>();
    if constexpr (ACROSS > 1) tile_multiply<3, 5, 7>();
  }
}

// What is accumulated on is added last, as in product.h; rows before `fresh` are another block's
template <int REGISTER>
inline void put(float* out, int64_t ld, int64_t fresh, int64_t rows, bool accumulate) {
  if (!accumulate) return tile_store<REGISTER>(out, 4 * ld);
  alignas(64) float sums[kSide * kSide];
  tile_store<REGISTER>(sums, 4 * kSide);
  for (int64_t r = fresh; r < rows; ++r) {
    float* to = out + r * ld;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums + r * kSide)));
  }
}

// Rows and steps are divided evenly, so that one configuration serves the whole product. The last rows may overlap
// those before them; where the last steps are fewer, they are copied, with zeros behind.
struct Product {
  Operand a, b;
  int64_t rows, cols;
  Parts row_parts, step_parts;
  int64_t whole, rest;  // parts of the steps that are complete, steps that remain
  alignas(64) uint32_t b_rest[kSide * 2 * kSide];

  Product(Operand a, Operand b, int64_t rows, int64_t cols, int64_t steps)
      : a(a), b(b), rows(rows), cols(cols), row_parts(rows), step_parts(steps) {
    whole = steps / step_parts.size;
    rest = steps - whole * step_parts.size;
    if (rest > 0) copy_padded(b.words + (steps - rest) * b.step, b.step, rest, cols, b_rest, 2 * kSide);
  }

  int64_t first_row(int64_t part) const { return smaller(part * row_parts.size, rows - row_parts.size); }

  template <int DOWN, int ACROSS>
  void block(int64_t part, float* out, int64_t ld, bool accumulate) const {
    const int64_t first = first_row(part), second = DOWN > 1 ? first_row(part + 1) : first, size = step_parts.size;
    const uint32_t *a0 = a.words + first * a.row, *a1 = a.words + second * a.row;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t k = 0; k < whole * size; k += size) {
      add_products<DOWN, ACROSS>(a0 + k, a1 + k, a.row, b.words + k * b.step, b.step);
    }
    if (rest > 0) {
      alignas(64) uint32_t a_rest[DOWN][kSide * kSide];
      copy_padded(a0 + whole * size, a.row, row_parts.size, rest, a_rest[0], kSide);
      if (DOWN > 1) copy_padded(a1 + whole * size, a.row, row_parts.size, rest, a_rest[DOWN - 1], kSide);
      add_products<DOWN, ACROSS>(a_rest[0], a_rest[DOWN - 1], kSide, b_rest, 2 * kSide);
    }
    float *out0 = out + first * ld, *out1 = out + second * ld;
    const int64_t fresh = part * row_parts.size - first, next_fresh = (part + 1) * row_parts.size - second;
    put<0>(out0, ld, fresh, row_parts.size, accumulate);
    if (ACROSS > 1) put<1>(out0 + kSide, ld, fresh, row_parts.size, accumulate);
    if (DOWN > 1) put<2>(out1, ld, next_fresh, row_parts.size, accumulate);
    if (DOWN > 1 && ACROSS > 1) put<3>(out1 + kSide, ld, next_fresh, row_parts.size, accumulate);
  }
};

void product(Operand a, Operand b, int64_t rows, int64_t cols, int64_t steps, float* out, int64_t ld, bool accumulate) {
  if (rows == 0) return;
  const Product p(a, b, rows, cols, steps);
  configure(p.row_parts.size, p.step_parts.size);
  int64_t part = 0;
  for (; part + 2 <= p.row_parts.count; part += 2) {
    cols > kSide ? p.block<2, 2>(part, out, ld, accumulate) : p.block<2, 1>(part, out, ld, accumulate);
  }
  if (part < p.row_parts.count) {
    cols > kSide ? p.block<1, 2>(part, out, ld, accumulate) : p.block<1, 1>(part, out, ld, accumulate);
  }
}

// One step of the transposition of 16 x 16 words: exchanges the off-diagonal halves of blocks of 2 * DISTANCE
template <int DISTANCE>
inline void exchange(__m512i (&rows)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i from_second = _mm512_set1_epi32(16), distance = _mm512_set1_epi32(DISTANCE);
  const __mmask16 odd = _mm512_test_epi32_mask(lane, distance);
  const __m512i upper = _mm512_mask_add_epi32(lane, odd, lane, _mm512_sub_epi32(from_second, distance));
  const __m512i lower = _mm512_add_epi32(upper, distance);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & DISTANCE) continue;
    const __m512i first = rows[i], second = rows[i + DISTANCE];
    rows[i] = _mm512_permutex2var_epi32(first, upper, second);
    rows[i + DISTANCE] = _mm512_permutex2var_epi32(first, lower, second);
  }
}

void transpose(Operand a, int64_t rows, int64_t steps, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t k = 0; k < steps; k += kSide) {
      const int64_t height = rows - r, width = steps - k;
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask16 valid = i < width ? first_lanes(height) : 0;
        words[i] = _mm512_maskz_loadu_epi32(valid, a.words + (k + i) * a.step + r);
      }
      exchange<1>(words);
      exchange<2>(words);
      exchange<4>(words);
      exchange<8>(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask16 valid = i < height ? first_lanes(width) : 0;
        _mm512_mask_storeu_epi32(out + (r + i) * steps + k, valid, words[i]);
      }
    }
  }
}

}  // namespace

KernelTable with_tile_registers(KernelTable table) {
  table.name = "amx_bf16";
  table.release = release;
  table.b16.product = product;
  table.b16.transpose = transpose;
  return table;
}

}  // namespace densenet_fast
