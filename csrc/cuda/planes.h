// What the 3x3 kernels share: the pixels of a tile and of its windows, and their channels in shared memory.
//
// Channels stand in planes of 16: a plane has a row of 32 bytes for each pixel, its two halves swapped in every other
// group of four rows, so that 16 bytes of any eight adjacent rows lie in different banks. Shared memory starts with 16
// zero bytes, which a neighbour outside of the image is read from.
#pragma once

#include "bn_relu_conv3x3.h"
#include "tensor_cores.h"
#include "tile.h"

namespace densenet_fast::cuda {

constexpr int kPlane = 16;             // channels of a plane
constexpr unsigned kRowBytes = 32;     // of a plane
constexpr unsigned kZerosBytes = 128;  // what stands before all else, so that the rest starts at a bank

__host__ __device__ constexpr int planes_of(int64_t channels) {
  return static_cast<int>((channels + kPlane - 1) / kPlane);
}
__host__ __device__ constexpr unsigned up_to_bank(unsigned bytes) { return (bytes + 127) / 128 * 128; }

// The place of bytes `at` of a plane
__device__ inline unsigned swapped(unsigned at) { return at ^ (at >> 3 & 16); }
__device__ inline unsigned place(unsigned row, unsigned half) { return swapped(row * kRowBytes + half * 16); }

template <typename P>
__device__ inline P* shared_at(unsigned place) {
  return reinterpret_cast<P*>(static_cast<unsigned char*>(shared_memory()) + place);
}

// Eight adjacent values, the first `valid` of memory, zeros behind; at once if the address is not `aligned`
template <bool CACHED, typename T>
__device__ inline void copy_eight(unsigned place, const T* from, int valid, bool aligned) {
  if (aligned && valid > 0) {
    copy_async<CACHED>(place, from, 2 * (valid < 8 ? valid : 8));
  } else {
    Pack<T, 8> values{};
    if (valid > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values.values[i] = i < valid ? from[i] : T();
    }
    values.store(shared_at<T>(place), 8);
  }
}

// The first `valid` of eight adjacent values, by 16 bytes, 8 or one value at a time
template <typename T>
__device__ inline void store_eight(const Pack<T, 8>& values, T* to, int valid, int width) {
  if (width == 8 && valid >= 8) {
    values.store(to, 8);
  } else {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      Pack<T, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four.values[i] = values.values[half + i];
      const int left = valid - half < 4 ? valid - half : 4;
      if (left == 4 && width < 4) {
        four.store(to + half, 3);
        to[half + 3] = four.values[3];
      } else if (left > 0) {
        four.store(to + half, left);
      }
    }
  }
}

// Channels `first_channel`... of the pixels in a tile's windows; the same pieces for the same thread every time, which
// visit(place, row, channel) gives
template <int THREADS, typename Visit>
__device__ inline void for_eights(const Tile& at, int first_channel, unsigned plane, Visit visit) {
  for (int e = threadIdx.x; e < 2 * at.t.slots; e += THREADS) {
    const int64_t row = at.row_of_slot(e / 2);
    if (row >= 0) visit(plane + place(e / 2, e % 2), row, first_channel + e % 2 * 8);
  }
}

template <int THREADS, typename T>
__device__ inline void copy_windows(const Matrix& m, const Tile& at, int first_channel, unsigned plane, bool aligned) {
  for_eights<THREADS>(at, first_channel, plane, [&](unsigned to, int64_t r, int c) {
    copy_eight<false>(to, row<const T>(m, r, c), static_cast<int>(m.cols) - c, aligned);
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

// relu(bn(values)) in the values' place; `vectors` are mean, scale and bias, `count` apart, of the first column
template <typename T>
__device__ inline void bn_relu_eight(T* values, const float* vectors, int count) {
  Pack<T, 8> pack;
  pack.load(values, 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const AffineColumn<float> column{vectors[i], vectors[count + i], vectors[2 * count + i]};
    pack.values[i] = narrow<T>(relu(column(widen(pack.values[i]))));
  }
  pack.store(values, 8);
}

__device__ inline unsigned lane_of() { return threadIdx.x % 32; }

__device__ inline void zero_the_start() {
  if (threadIdx.x < 4) shared_at<unsigned>(0)[threadIdx.x] = 0;
}

// Whether the code is compiled for GPUs that have these instructions
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;
#else
constexpr bool kHasTensorCores = true;
#endif

// Calls f(T()) for the types of tensor cores
template <typename F>
const char* by_half(Type type, F f) {
  return type == Type::f16 ? f(f16()) : f(bf16());
}

}  // namespace densenet_fast::cuda
