// What the 3x3 kernels share: channels of pixels in shared memory, how they come there and how they are rectified.
//
// Channels stand in planes of 16: a plane has a row of 32 bytes for each pixel, its two halves swapped in every other
// group of four rows, so that 16 bytes of any eight adjacent rows lie in different banks. Shared memory starts with 16
// zero bytes, which a neighbour outside of the image is read from. Threads copy and rectify pieces of eight channels;
// those that a thread rectifies it has copied itself, so that it waits for nobody.
#pragma once

#include "bn_relu_conv3x3.h"
#include "tensor_cores.h"
#include "tile.h"

namespace densenet_fast::cuda {

constexpr int kPlane = 16;             // channels of a plane
constexpr int kPiece = 8;              // channels of a piece: 16 bytes
constexpr unsigned kRowBytes = 32;     // of a plane
constexpr unsigned kZerosBytes = 128;  // what stands before all else, so that the rest starts at a bank

// Whether the code is compiled for GPUs that have these instructions
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif

__host__ __device__ constexpr int planes_of(int64_t channels) {
  return static_cast<int>((channels + kPlane - 1) / kPlane);
}
__host__ __device__ constexpr unsigned up_to_bank(unsigned bytes) { return (bytes + 127) / 128 * 128; }

// The place of byte `at` of a plane, and of half a row. 256 bytes further everything repeats.
__device__ inline unsigned swapped(unsigned at) { return at ^ (at >> 3 & 16); }
__device__ inline unsigned place(unsigned row, unsigned half) { return swapped(row * kRowBytes + half * 16); }

template <typename P>
__device__ inline P* shared_at(unsigned place) {
  return reinterpret_cast<P*>(static_cast<unsigned char*>(shared_memory()) + place);
}

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % 32; }

__device__ inline void zero_the_start() {
  if (threadIdx.x < 4) shared_at<unsigned>(0)[threadIdx.x] = 0;
}

// The first `valid` of a piece in memory, zeros behind, by a thread that waits for them
template <typename T>
__device__ inline void copy_at_once(unsigned place, const T* from, int valid) {
#pragma unroll 1
  for (int i = 0; i < kPiece; ++i) shared_at<T>(place)[i] = i < valid ? from[i] : narrow<T>(0.0f);
}

// Pieces of which the first `valid` columns exist: by copies that go on, if addresses are multiples of 16 bytes;
// for_pieces(copy) calls copy(place, from) for each
template <bool CACHED, typename T, typename ForPieces>
__device__ inline void copy_pieces(int valid, bool aligned, ForPieces for_pieces) {
  if (aligned && valid > 0) {
    const int bytes = valid < kPiece ? 2 * valid : 16;
    for_pieces([&](unsigned to, const T* from) { copy_async<CACHED>(to, from, bytes); });
  } else {
    for_pieces([&](unsigned to, const T* from) { copy_at_once(to, from, valid); });
  }
}

// The first `valid` of a piece to memory, by 16 bytes, 8 or one value at a time
template <typename T>
__device__ inline void store_piece(unsigned place, T* to, int valid, int width) {
  Pack<T, kPiece> values;
  values.load(shared_at<T>(place), kPiece);
  if (width == kPiece && valid >= kPiece) {
    values.store(to, kPiece);
  } else if (width == kPiece / 2 && valid >= kPiece) {
    reinterpret_cast<uint2*>(to)[0] = shared_at<uint2>(place)[0];
    reinterpret_cast<uint2*>(to)[1] = shared_at<uint2>(place)[1];
  } else {
#pragma unroll 1
    for (int i = 0; i < kPiece && i < valid; ++i) to[i] = shared_at<T>(place)[i];
  }
}

// Of a plane with the pixels in a tile's windows, a thread's pieces, the same every time: visit(place, row of the
// matrix); its channels are `threadIdx.x % 2 * 8`...
template <int THREADS, typename Visit>
__device__ inline void for_windows(const Tile& at, unsigned plane, Visit visit) {
  constexpr int kStep = THREADS / 2;
  static_assert(kStep % 8 == 0);
  int slot = static_cast<int>(threadIdx.x) / 2;
  unsigned piece = plane + place(slot, threadIdx.x % 2);
  if (at.consecutive()) {
    const int before = at.t.first - at.start, after = at.t.rows + before;
    const int last = at.t.slots < after ? at.t.slots : after;
#pragma unroll 1
    for (; slot < before; slot += kStep) piece += kStep * kRowBytes;
#pragma unroll 2
    for (; slot < last; slot += kStep, piece += kStep * kRowBytes) visit(piece, slot - before);
  } else {
#pragma unroll 1
    for (; slot < at.t.slots; slot += kStep, piece += kStep * kRowBytes)
      if (at.slot_inside(slot)) visit(piece, at.row_of_slot(slot));
  }
}

// Channels `first_channel`... of the pixels in a tile's windows into a plane
template <int THREADS, typename T>
__device__ inline void copy_windows(const Matrix& m, const Tile& at, int first_channel, unsigned plane, bool aligned) {
  const int c = first_channel + threadIdx.x % 2 * kPiece;
  const T* const from = static_cast<const T*>(m.data) + c;
  copy_pieces<false, T>(static_cast<int>(m.cols) - c, aligned, [&](auto copy) {
    for_windows<THREADS>(at, plane, [&](unsigned piece, int r) { copy(piece, from + r * m.ld); });
  });
}

// Vectors of `count` columns from `first` on, into shared memory [vectors, count] float, zeros beyond the last column
template <int THREADS, typename T>
__device__ inline void copy_affine(const Affine& affine, int64_t cols, int first, int count, unsigned to) {
  float* vectors = shared_at<float>(to);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int64_t c = first + i;
    const bool inside = c < cols;
    vectors[i] = inside ? static_cast<const float*>(affine.mean)[c] : 0;
    vectors[count + i] = inside ? scale_of<T>(affine, c) : 0;
    vectors[2 * count + i] = inside ? element<T>(affine.bias, affine.narrow_bias, c) : 0;
  }
}

// A piece's columns of such vectors
template <int VECTORS>
struct PieceVectors {
  float values[VECTORS][kPiece];

  __device__ PieceVectors(const float* vectors, int count) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int i = 0; i < kPiece; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(vectors + v * count + i);
        values[v][i] = four.x, values[v][i + 1] = four.y, values[v][i + 2] = four.z, values[v][i + 3] = four.w;
      }
  }
};

// relu(bn(values)) in a piece's place, by its mean, scale and bias
template <typename T, int VECTORS>
__device__ inline void bn_relu_piece(T* piece, const PieceVectors<VECTORS>& by) {
  Pack<T, kPiece> values;
  values.load(piece, kPiece);
  unsigned pairs[kPiece / 2];
#pragma unroll
  for (int i = 0; i < kPiece; i += 2) {
    float y[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      y[e] = AffineColumn<float>{by.values[0][i + e], by.values[1][i + e],
                                 by.values[2][i + e]}(widen(values.values[i + e]));
    pairs[i / 2] = relu_pair<T>(y[0], y[1]);
  }
  *reinterpret_cast<uint4*>(piece) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Calls f(T()) for the types of tensor cores
template <typename F>
const char* by_half(Type type, F f) {
  return type == Type::f16 ? f(f16()) : f(bf16());
}

}  // namespace densenet_fast::cuda
