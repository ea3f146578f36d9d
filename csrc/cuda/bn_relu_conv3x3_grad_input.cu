// The gradient of Y = conv3x3(relu(bn(Z)), W2) with respect to Z, from dY, and its column sums:
//
//   D = (bn(Z) > 0) * (dY correlated with W2);   scale * D;   sum D;   sum D * (Z - mean)
//
// A block of four warps owns 64 columns, keeps their part of W2 in shared memory, and takes one tile of pixels after
// another. The next tile's windows of dY come while a tile is finished, and Z's tile while its products run; scale * D
// takes its place, from which it is stored. A warp owns 16 * MT pixels.
#include "planes.h"

namespace densenet_fast::cuda {
namespace {

constexpr int kGradThreads = 128;
constexpr int kColumnTiles = kGradColumns / 8;

// Where things stand in shared memory
struct GradPlaces {
  unsigned vectors, weights, weight_plane, grad, grad_plane, z, bytes;

  __host__ __device__ GradPlaces(const Conv3x3GradInput& p, int tile) {
    const int planes = planes_of(p.grad.cols);
    vectors = kZerosBytes;
    weights = up_to_bank(vectors + 3 * sizeof(float) * kGradColumns);
    weight_plane = 9 * planes * kPlane * kRowBytes;
    grad = weights + kGradColumns / kPlane * weight_plane;
    grad_plane = up_to_bank(p.pixels.slots * kRowBytes);
    z = grad + planes * grad_plane;
    const unsigned tiles = planes * grad_plane + tile * 2 * kGradColumns;
    const unsigned sums = 2 * sizeof(float) * kGradColumns * kGradThreads / 4;  // at last, from dY's place on
    bytes = grad + (tiles > sums ? tiles : sums);
  }
};

// W2's part: for each 16 of the columns a plane with row (tap * planes + k / 16) * 16 + k % 16
template <typename T>
__device__ void copy_weight(const Conv3x3GradInput& p, const GradPlaces& places, int first_column) {
  const int outputs = static_cast<int>(p.grad.cols), channels = static_cast<int>(p.z.cols);
  const int padded = planes_of(outputs) * kPlane, rows = 9 * padded;
  for (int e = threadIdx.x; e < kGradColumns / 8 * rows; e += kGradThreads) {
    const int piece = e % (kGradColumns / 8), r = e / (kGradColumns / 8);
    const int tap = r / padded, j = r % padded, c = first_column + piece * 8;
    const unsigned to = places.weights + piece / 2 * places.weight_plane + place(r, piece % 2);
    const T* from = static_cast<const T*>(p.weight) + (static_cast<int64_t>(j) * 9 + tap) * channels + c;
    copy_eight<true>(to, from, j < outputs ? channels - c : 0, p.aligned);
  }
}

// The place of eight adjacent columns of a pixel in Z's tile: rows of 128 bytes, whose pieces are permuted so that the
// same piece of eight adjacent rows lies in different banks
__device__ inline unsigned in_tile(int i, int piece) { return i * 2 * kGradColumns + ((piece ^ i % 8) * 16); }

// f(place, row, first column, columns that there are) for every eight adjacent columns of the tile that there are
template <int R, typename F>
__device__ void for_tile(const Conv3x3GradInput& p, const Tile& at, int first_column, unsigned z, F f) {
  for (int e = threadIdx.x; e < R * kGradColumns / 8; e += kGradThreads) {
    const int i = e / (kGradColumns / 8), piece = e % (kGradColumns / 8), c = first_column + piece * 8;
    const int64_t r = at.row(i);
    const int valid = static_cast<int>(p.z.cols) - c;
    if (r >= 0 && valid > 0) f(z + in_tile(i, piece), r, c, valid);
  }
}

template <typename T, int MT>
__device__ void multiply_tile(float (&acc)[MT][kColumnTiles][4], const unsigned (&pixel)[MT],
                              const unsigned (&taps)[MT], const Conv3x3GradInput& p, const GradPlaces& places) {
  const unsigned lane = lane_of(), output = place(lane % 16, lane / 16);
  const int planes = planes_of(p.grad.cols);
  for (int k = 0; k < planes; ++k) {
    const unsigned grad = places.grad + k * places.grad_plane;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {  // of dY's pixel, seen from D's: W2's is the opposite one
      const unsigned weights = places.weights + ((8 - tap) * planes + k) * kPlane * kRowBytes + output;
      const int away = slots_to(tap, p.pixels.pitch) * static_cast<int>(kRowBytes);
      unsigned b[kColumnTiles / 2][4];
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n) load_matrices_transposed(b[n], weights + n * places.weight_plane);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        unsigned a[4];
        load_matrices(a, taps[m] >> tap & 1 ? grad + swapped(pixel[m] + away) : 0);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) multiply<T>(acc[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// Puts scale * D in the place of Z, pixel by pixel of this lane, and adds to its columns' sums
template <typename T, int MT>
__device__ void finish_tile(const float (&acc)[MT][kColumnTiles][4], const Tile& at, int first_pixel, unsigned z,
                            const float* vectors, float (&sum_d)[kColumnTiles][2], float (&sum_dx)[kColumnTiles][2]) {
  const int lane = static_cast<int>(lane_of()), in_piece = lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int i = first_pixel + m * 16 + lower * 8 + lane / 4;
      if (at.row(i) < 0) continue;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        T* const values = shared_at<T>(z + in_tile(i, n)) + in_piece;
        const float* const vector = vectors + n * 8 + in_piece;
        Pack<T, 2> pair;
        pair.load(values, 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float mean = vector[e], scale = vector[kGradColumns + e], bias = vector[2 * kGradColumns + e];
          const float centred = widen(pair.values[e]) - mean;
          const float d = centred * scale + bias <= 0 ? 0.0f : acc[m][n][2 * lower + e];
          sum_d[n][e] += d;
          sum_dx[n][e] += d * centred;
          pair.values[e] = narrow<T>(scale * d);
        }
        pair.store(values, 2);
      }
    }
}

// partials [blocks, 2, B] from what each lane has; in `memory` there is room for 2 * 64 of each four lanes
__device__ void store_sums(const float (&sum_d)[kColumnTiles][2], const float (&sum_dx)[kColumnTiles][2],
                           const Conv3x3GradInput& p, int first_column, float* memory) {
  const int lane = static_cast<int>(lane_of()), row = static_cast<int>(threadIdx.x) / 4;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float* const to = memory + row * 2 * kGradColumns + n * 8 + lane % 4 * 2 + e;
      to[0] = sum_d[n][e];
      to[kGradColumns] = sum_dx[n][e];
    }
  __syncthreads();
  const int which = static_cast<int>(threadIdx.x) / kGradColumns, c = static_cast<int>(threadIdx.x) % kGradColumns;
  float sum = 0;
  for (int r = 0; r < kGradThreads / 4; ++r) sum += memory[r * 2 * kGradColumns + threadIdx.x];
  if (first_column + c < p.z.cols)
    p.partials[(static_cast<int64_t>(blockIdx.y) * 2 + which) * p.z.cols + first_column + c] = sum;
}

template <typename T, int MT>
__global__ __launch_bounds__(kGradThreads, 3) void conv3x3_grad_input_kernel(const Conv3x3GradInput p) {
  if constexpr (kHasTensorCores) {
    constexpr int R = 64 * MT;
    const GradPlaces places(p, R);
    const int first_column = static_cast<int>(blockIdx.x) * kGradColumns, lane = static_cast<int>(lane_of());
    const int first_pixel = static_cast<int>(threadIdx.x) / 32 * 16 * MT;
    const float* const vectors = shared_at<float>(places.vectors);
    const auto copy_grad = [&](int64_t tile) {
      const Tile at(p.pixels, tile);
      for (int k = 0; k < planes_of(p.grad.cols); ++k)
        copy_windows<kGradThreads, T>(p.grad, at, k * kPlane, places.grad + k * places.grad_plane, p.grad_aligned);
      commit_copies();
    };
    zero_the_start();
    copy_affine<kGradThreads, T>(p.affine, p.z.cols, first_column, kGradColumns, places.vectors);
    copy_weight<T>(p, places, first_column);
    copy_grad(blockIdx.y);

    float sum_d[kColumnTiles][2] = {}, sum_dx[kColumnTiles][2] = {};
    for (int64_t tile = blockIdx.y; tile < p.pixels.tiles; tile += p.blocks) {
      const Tile at(p.pixels, tile);
      for_tile<R>(p, at, first_column, places.z, [&](unsigned to, int64_t r, int c, int valid) {
        copy_eight<false>(to, row<const T>(p.z, r, c), valid, p.aligned);
      });
      commit_copies();
      unsigned pixel[MT], taps[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const int i = first_pixel + m * 16 + lane % 16;
        pixel[m] = at.slot(i) * kRowBytes + lane / 16 * 16;
        taps[m] = at.taps(i);
      }
      wait_for_copies<1>();
      __syncthreads();  // dY's windows are there, and W2
      float acc[MT][kColumnTiles][4] = {};
      multiply_tile<T>(acc, pixel, taps, p, places);
      wait_for_copies<0>();
      __syncthreads();  // Z's tile is there, and nobody reads dY's any more
      if (tile + p.blocks < p.pixels.tiles) copy_grad(tile + p.blocks);
      finish_tile<T>(acc, at, first_pixel, places.z, vectors, sum_d, sum_dx);
      __syncthreads();
      for_tile<R>(p, at, first_column, places.z, [&](unsigned from, int64_t r, int c, int valid) {
        Pack<T, 8> values;
        values.load(shared_at<T>(from), 8);
        store_eight(values, row<T>(p.scaled, r, c), valid, p.scaled_width);
      });
      __syncthreads();  // Z's tile may be overwritten
    }
    store_sums(sum_d, sum_dx, p, first_column, shared_at<float>(places.grad));
  }
}

template <typename T, int MT>
const char* launch_grad_input(const Conv3x3GradInput& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.z.cols + kGradColumns - 1) / kGradColumns), static_cast<unsigned>(p.blocks));
  const unsigned bytes = GradPlaces(p, 64 * MT).bytes;
  return launch(conv3x3_grad_input_kernel<T, MT>, grid, dim3(kGradThreads), bytes, stream, p);
}

}  // namespace

const char* bn_relu_conv3x3_grad_input(const Conv3x3GradInput& p, Type type, void* stream) {
  return by_half(type, [&]<typename T>(T) {
    return p.pixels.tile == kGradTile ? launch_grad_input<T, 2>(p, stream) : launch_grad_input<T, 1>(p, stream);
  });
}

}  // namespace densenet_fast::cuda
