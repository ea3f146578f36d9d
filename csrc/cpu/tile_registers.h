// The tile registers of AMX (Intel's Software Developer's Manual, volume 1, chapter 18): eight, each of as many as 16
// rows of 64 bytes, in the shape that a thread configures. Inline assembly, since the compilers' intrinsics do not say
// that they read memory.
//
// Example:
//
//   TileShapes shapes;  // three registers of 16 rows of 64 bytes
//   for (int i = 0; i < 3; ++i) {
//     shapes.rows[i] = 16;
//     shapes.row_bytes[i] = 64;
//   }
//   tile_configure(shapes);
//   tile_zero<0>();
//   tile_load<1>(a, 64);
//   tile_load<2>(b, 64);
//   tile_multiply<0, 1, 2>();
//   tile_store<0>(out, 64);  // out [16, 16] = a [16, 32] * b [32, 16]
//   tile_release();
#pragma once

#include <cstdint>

namespace densenet_fast {
namespace {

// The operand of ldtilecfg
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace
}  // namespace densenet_fast

#if defined(DENSENET_FAST_EMULATED_TILES)
#include "tile_emulator.h"
#else

namespace densenet_fast {
namespace {

inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }

inline void tile_release() { asm volatile("tilerelease"); }

template <int REGISTER>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}

// `stride`: bytes from row to row
template <int REGISTER>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(REGISTER), "r"(from), "r"(stride) : "memory");
}

template <int REGISTER>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(REGISTER), "r"(to), "r"(stride) : "memory");
}

// SUMS += A * B, float += bf16 * bf16; a word of A, and of B, is two steps of what is summed over
template <int SUMS, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}

}  // namespace
}  // namespace densenet_fast

#endif
