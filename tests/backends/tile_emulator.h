// Tile registers on any processor: the functions of csrc/cpu/tile_registers.h,
// in whose place this comes, as the instructions compute (Intel's Software
// Developer's Manual, volume 2). What would fault there ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace densenet_fast {
namespace {

struct TileRegister {
  int rows = 0, row_bytes = 0;
  alignas(64) unsigned char bytes[16][64];
};

inline thread_local struct {
  bool configured = false;
  TileRegister registers[8];
} tiles;

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tile registers: %s\n", what);
  std::abort();
}

// A configured register
inline TileRegister& tile(int i) {
  TileRegister& result = tiles.registers[i];
  expect(tiles.configured && result.rows > 0, "not configured");
  return result;
}

inline void tile_configure(const TileShapes& shapes) {
  expect(shapes.palette == 1 && shapes.start_row == 0, "a palette that does not exist");
  tiles.configured = true;
  for (int i = 0; i < 16; ++i) {
    const int rows = shapes.rows[i], row_bytes = shapes.row_bytes[i];
    expect(rows <= (i < 8 ? 16 : 0) && row_bytes <= (i < 8 ? 64 : 0), "too large a shape");
    expect((rows == 0) == (row_bytes == 0), "a shape with rows or columns alone");
    if (i < 8) tiles.registers[i] = {rows, row_bytes, {}};
  }
}

inline void tile_release() { tiles.configured = false; }

template <int REGISTER>
inline void tile_zero() {
  std::memset(tile(REGISTER).bytes, 0, sizeof(TileRegister::bytes));
}

template <int REGISTER>
inline void tile_load(const void* from, int64_t stride) {
  TileRegister& to = tile(REGISTER);
  std::memset(to.bytes, 0, sizeof(to.bytes));
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.bytes[r], static_cast<const char*>(from) + r * stride, to.row_bytes);
}

template <int REGISTER>
inline void tile_store(void* to, int64_t stride) {
  const TileRegister& from = tile(REGISTER);
  for (int r = 0; r < from.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from.bytes[r], from.row_bytes);
}

inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flush(x);
}

template <int SUMS, int A, int B>
inline void tile_multiply() {
  static_assert(SUMS != A && SUMS != B && A != B);
  TileRegister& sums = tile(SUMS);
  const TileRegister &a = tile(A), &b = tile(B);
  expect(sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, "shapes do not match");
  expect(sums.row_bytes % 4 == 0, "part of a word");
  for (int m = 0; m < sums.rows; ++m) {
    float low[16] = {}, high[16] = {}, total[16] = {};
    for (int k = 0; k < b.rows; ++k) {
      uint32_t pair, pairs[16];
      std::memcpy(&pair, a.bytes[m] + 4 * k, sizeof(pair));
      std::memcpy(pairs, b.bytes[k], sizeof(pairs));
      for (int n = 0; n < 16; ++n) {
        low[n] = flush(__builtin_fmaf(as_float(pair << 16), as_float(pairs[n] << 16), low[n]));
        high[n] = flush(__builtin_fmaf(as_float(pair & 0xffff0000), as_float(pairs[n] & 0xffff0000), high[n]));
      }
    }
    std::memcpy(total, sums.bytes[m], sizeof(total));
    for (int n = 0; n < 16; ++n) total[n] = flush(flush(total[n]) + flush(low[n] + high[n]));
    std::memcpy(sums.bytes[m], total, sums.row_bytes);
  }
}

}  // namespace
}  // namespace densenet_fast
