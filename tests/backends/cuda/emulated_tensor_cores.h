// The instructions of csrc/cuda/tensor_cores.h on a CPU.
//
// A copy that goes on while its thread works is made when the thread waits for it or, where threads run in reverse
// order, as soon as it begins: whoever reads too early, or overwrites what others still read, shows. Places outside of
// shared memory, or not at a multiple of 16 bytes, are errors.
#pragma once

#include <array>

namespace densenet_fast::cuda {

// What a lane brings to an instruction, and where its result goes
struct Operands {
  unsigned place, a[4], b[2];
  unsigned* matrices;
  float* d;
};
inline std::array<Operands, kWarp> lanes;

inline bool is_shared(unsigned place) {
  if (place % 16 == 0 && place + 16 <= block.shared.size()) return true;
  block.fault = "an access outside of shared memory, or not at a multiple of 16 bytes";
  return false;
}

inline void make(const Copy& copy) {
  if (!is_shared(copy.place)) return;
  std::memset(block.shared.data() + copy.place, 0, 16);
  std::memcpy(block.shared.data() + copy.place, copy.from, copy.bytes);
}

template <bool CACHED>
void copy_async(unsigned place, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes < 0 || bytes > 16)
    block.fault = "a copy from an address that is no multiple of 16 bytes, or of another size";
  const Copy copy{place, from, bytes};
  if (in_reverse()) make(copy);
  block.running->copies.back().push_back(copy);
}

inline void commit_copies() { block.running->copies.emplace_back(); }

template <int N>
void wait_for_copies() {
  auto& groups = block.running->copies;
  while (groups.size() > N + 1) {
    if (!in_reverse())
      for (const Copy& copy : groups.front()) make(copy);
    groups.erase(groups.begin());
  }
}

// Executes `instruction` with what the lanes bring, and returns when all have
inline void with_the_warp(const Operands& own, void (*instruction)()) {
  lanes[threadIdx.x % kWarp] = own;
  if (block.instruction != nullptr && block.instruction != instruction)
    block.fault = "lanes of a warp at different instructions";
  block.instruction = instruction;
  block.running->leave(Stop::warp);
}

inline void __syncwarp() {
  with_the_warp({}, [] {});
}

template <bool TRANSPOSED>
void load_for_all() {
  for (unsigned q = 0; q < 4; ++q) {
    uint16_t matrix[8][8];
    for (unsigned r = 0; r < 8; ++r) {
      const unsigned place = lanes[8 * q + r].place;
      if (is_shared(place)) std::memcpy(matrix[r], block.shared.data() + place, 16);
    }
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned g = l / 4, t = 2 * (l % 4);
      const unsigned low = TRANSPOSED ? matrix[t][g] : matrix[g][t];
      const unsigned high = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
      lanes[l].matrices[q] = high << 16 | low;
    }
  }
}

inline void load_matrices(unsigned (&m)[4], unsigned place) {
  with_the_warp({place, {}, {}, m, nullptr}, load_for_all<false>);
}
inline void load_matrices_transposed(unsigned (&m)[4], unsigned place) {
  with_the_warp({place, {}, {}, m, nullptr}, load_for_all<true>);
}

inline void sum_rows_for_all() {
  for (unsigned distance = 4; distance < kWarp; distance *= 2)
    for (unsigned l = 0; l < kWarp; ++l)
      if ((l & distance) == 0) *lanes[l].d = *lanes[l ^ distance].d = *lanes[l].d + *lanes[l ^ distance].d;
}

inline float sum_of_rows(float value) {
  with_the_warp({0, {}, {}, nullptr, &value}, sum_rows_for_all);
  return value;
}

template <typename T>
unsigned relu_pair(float low, float high) {
  unsigned pair = 0;
  for (const float value : {high, low}) {
    const T rounded = narrow<T>(relu(value));
    uint16_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    pair = pair << 16 | bits;
  }
  return pair;
}

template <typename T>
float half_of(unsigned pair, unsigned i) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * i);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return widen(value);
}

template <typename T>
void multiply_for_all() {
  float a[16][16], b[8][16];  // b by columns
  for (unsigned l = 0; l < kWarp; ++l) {
    const unsigned g = l / 4, t = 2 * (l % 4);
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned half = 0; half < 2; ++half) {
        a[g][t + 8 * half + i] = half_of<T>(lanes[l].a[2 * half], i);
        a[g + 8][t + 8 * half + i] = half_of<T>(lanes[l].a[2 * half + 1], i);
        b[g][t + 8 * half + i] = half_of<T>(lanes[l].b[half], i);
      }
  }
  for (unsigned l = 0; l < kWarp; ++l)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      float sum = lanes[l].d[i];
      for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      lanes[l].d[i] = sum;
    }
}

template <typename T>
void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  with_the_warp({0, {a[0], a[1], a[2], a[3]}, {b0, b1}, nullptr, d}, multiply_for_all<T>);
}

}  // namespace densenet_fast::cuda
