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

constexpr int kWarps = 4, kGradThreads = 32 * kWarps;
constexpr int kColumnTiles = kGradColumns / 8;
constexpr int kPieces = kGradColumns / kPiece;  // of a pixel

// Where things stand in shared memory
struct GradPlaces {
  unsigned vectors, sums, weights, weight_plane, grad, grad_plane, z, bytes;

  __host__ __device__ GradPlaces(const Conv3x3GradInput& p, int tile) {
    const int planes = planes_of(p.grad.cols);
    vectors = kZerosBytes;
    sums = vectors + 3 * sizeof(float) * kGradColumns;
    weights = up_to_bank(sums + kWarps * 2 * sizeof(float) * kGradColumns);
    weight_plane = 9 * planes * kPlane * kRowBytes;
    grad = weights + kGradColumns / kPlane * weight_plane;
    grad_plane = up_to_bank(p.pixels.slots * kRowBytes);
    z = grad + planes * grad_plane;
    bytes = z + tile * 2 * kGradColumns;
  }
};

// W2's part: for each 16 of the columns a plane with row (tap * planes + k / 16) * 16 + k % 16
template <typename T>
__device__ void copy_weight(const Conv3x3GradInput& p, const GradPlaces& places, int first_column) {
  const int outputs = static_cast<int>(p.grad.cols), channels = static_cast<int>(p.z.cols);
  const int padded = planes_of(outputs) * kPlane, piece = threadIdx.x % kPieces, c = first_column + piece * kPiece;
  const T* const from = static_cast<const T*>(p.weight) + c;
  copy_pieces<true, T>(channels - c, p.aligned, [&](auto copy) {
    for (int r = static_cast<int>(threadIdx.x) / kPieces; r < 9 * padded; r += kGradThreads / kPieces) {
      const int tap = r / padded, j = r % padded;
      const unsigned to = places.weights + piece / 2 * places.weight_plane + place(r, piece % 2);
      if (j < outputs)
        copy(to, from + (j * 9 + tap) * channels);
      else
        copy_at_once(to, from, 0);
    }
  });
}

// The place of eight adjacent columns of a pixel in Z's tile: rows of 128 bytes, whose pieces are permuted so that the
// same piece of eight adjacent rows lies in different banks
__device__ inline unsigned in_tile(int i, int piece) { return i * 2 * kGradColumns + ((piece ^ i % 8) * 16); }

// f(place, row) for a thread's pieces of the tile, of columns `threadIdx.x % 8 * 8`...
template <int R, typename F>
__device__ void for_tile(const Tile& at, unsigned z, F f) {
  int i = static_cast<int>(threadIdx.x) / kPieces;
  unsigned piece = z + in_tile(i, threadIdx.x % kPieces);
#pragma unroll 1
  for (; i < R; i += kGradThreads / kPieces, piece += kGradThreads / kPieces * 2 * kGradColumns)
    if (at.inside(i)) f(piece, at.row(i));
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

// Puts scale * D in the place of Z, pixel by pixel of this lane, and adds to its warp's sums [2, 64] of columns
template <typename T, int MT>
__device__ void finish_tile(const float (&acc)[MT][kColumnTiles][4], const Tile& at, int first_pixel, unsigned z,
                            const float* vectors, float* sums) {
  const int lane = lane_of(), in_piece = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    float2 vector[3];
#pragma unroll
    for (int v = 0; v < 3; ++v)
      vector[v] = *reinterpret_cast<const float2*>(vectors + v * kGradColumns + n * 8 + in_piece);
    const AffineColumn<float> columns[2] = {{vector[0].x, vector[1].x, vector[2].x},
                                            {vector[0].y, vector[1].y, vector[2].y}};
    float sum_d[2] = {}, sum_dx[2] = {};
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int i = first_pixel + m * 16 + lower * 8 + lane / 4;
        if (!at.inside(i)) continue;
        T* const values = shared_at<T>(z + in_tile(i, n)) + in_piece;
        Pack<T, 2> pair;
        pair.load(values, 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = widen(pair.values[e]);
          const float d = columns[e](value) <= 0 ? 0.0f : acc[m][n][2 * lower + e];
          sum_d[e] += d;
          sum_dx[e] += d * (value - columns[e].mean);
          pair.values[e] = narrow<T>(columns[e].scale * d);
        }
        pair.store(values, 2);
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float d = sum_of_rows(sum_d[e]), dx = sum_of_rows(sum_dx[e]);
      if (lane < 4) {
        sums[n * 8 + in_piece + e] += d;
        sums[kGradColumns + n * 8 + in_piece + e] += dx;
      }
    }
  }
}

// partials [blocks, 2, B] from the sums [warps, 2, 64]
__device__ void store_sums(const float* sums, const Conv3x3GradInput& p, int first_column) {
  const int which = static_cast<int>(threadIdx.x) / kGradColumns, c = static_cast<int>(threadIdx.x) % kGradColumns;
  float sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w * 2 * kGradColumns + threadIdx.x];
  if (first_column + c < p.z.cols)
    p.partials[(static_cast<int64_t>(blockIdx.y) * 2 + which) * p.z.cols + first_column + c] = sum;
}

template <typename T, int MT>
__global__ __launch_bounds__(kGradThreads, 3) void bn_relu_conv3x3_grad_input_kernel(const Conv3x3GradInput p) {
  if constexpr (kHasTensorCores) {
    constexpr int R = 64 * MT;
    const GradPlaces places(p, R);
    const int first_column = static_cast<int>(blockIdx.x) * kGradColumns, lane = lane_of();
    const int first_pixel = static_cast<int>(threadIdx.x) / 32 * 16 * MT;
    const float* const vectors = shared_at<float>(places.vectors);
    float* const sums = shared_at<float>(places.sums);
    const int column = first_column + static_cast<int>(threadIdx.x) % kPieces * kPiece;
    const int valid = static_cast<int>(p.z.cols) - column;
    const auto copy_grad = [&](int tile) {
      const Tile at(p.pixels, tile);
      for (int k = 0; k < planes_of(p.grad.cols); ++k)
        copy_windows<kGradThreads, T>(p.grad, at, k * kPlane, places.grad + k * places.grad_plane, p.grad_aligned);
      commit_copies();
    };
    zero_the_start();
    copy_affine<kGradThreads, T>(p.affine, p.z.cols, first_column, kGradColumns, places.vectors);
    copy_weight<T>(p, places, first_column);
    copy_grad(static_cast<int>(blockIdx.y));

    for (int w = 0; w < kWarps; ++w) sums[w * kGradThreads + threadIdx.x] = 0;
#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.y); tile < p.pixels.tiles; tile += p.blocks) {
      const Tile at(p.pixels, tile);
      copy_pieces<false, T>(valid, p.aligned, [&](auto copy) {
        for_tile<R>(at, places.z, [&](unsigned piece, int r) { copy(piece, row<const T>(p.z, r, column)); });
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
      finish_tile<T>(acc, at, first_pixel, places.z, vectors, sums + threadIdx.x / 32 * 2 * kGradColumns);
      __syncthreads();  // scale * D is there; what a thread stores, its next copies overwrite
      for_tile<R>(at, places.z, [&](unsigned piece, int r) {
        store_piece(piece, row<T>(p.scaled, r, column), valid, p.scaled_width);
      });
    }
    store_sums(sums, p, first_column);
  }
}

template <typename T, int MT>
const char* launch_grad_input(const Conv3x3GradInput& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.z.cols + kGradColumns - 1) / kGradColumns), static_cast<unsigned>(p.blocks));
  const unsigned bytes = GradPlaces(p, 64 * MT).bytes;
  return launch(bn_relu_conv3x3_grad_input_kernel<T, MT>, grid, dim3(kGradThreads), bytes, stream, p);
}

}  // namespace

const char* bn_relu_conv3x3_grad_input(const Conv3x3GradInput& p, Type type, void* stream) {
  return by_half(type, [&]<typename T>(T) {
    return p.pixels.tile == kGradTile ? launch_grad_input<T, 2>(p, stream) : launch_grad_input<T, 1>(p, stream);
  });
}

}  // namespace densenet_fast::cuda
