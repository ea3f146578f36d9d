// The gradient of Y = conv3x3(relu(bn(Z)), W2) with respect to W2, from dY, in parts; and on the way dZ, completed by
// what passes through its statistics, from the Z that is at hand:
//
//   dW2[j, dy, dx, b] = sum_p dY[p - dy * W - dx, j] * relu(bn(Z))[p, b]
//   dZ = dz + (P + 2 * Q * (Z - mean)) / count
//
// A block owns 64 channels, 8 * NT outputs and a range of tiles of pixels. The next tile of Z and the next
// windows of dY come while a tile's products run. A warp owns 16 * MT of the channels and the three taps of one dy,
// whose products it keeps in registers until the end of the range.
#include "planes.h"

namespace densenet_fast::cuda {
namespace {

constexpr int kPieces = kGradColumns / kPiece;  // of a pixel
constexpr int kVectors = 5;                     // mean, scale, bias, constant and slope

// Where things stand in shared memory
struct WeightPlaces {
  unsigned vectors, stages, grad, grad_plane, taps, stage_bytes, bytes;  // grad and taps: from the start of a stage

  __host__ __device__ WeightPlaces(const Conv3x3GradWeight& p, int outputs) {
    vectors = kZerosBytes;
    stages = up_to_bank(vectors + kVectors * sizeof(float) * kGradColumns);
    grad = kGradColumns / kPlane * kGradTile * kRowBytes;
    grad_plane = up_to_bank(p.pixels.slots * kRowBytes);
    taps = grad + planes_of(outputs) * grad_plane;
    stage_bytes = up_to_bank(taps + kGradTile * sizeof(uint16_t));
    bytes = stages + 2 * stage_bytes;
  }
};

// constant = P / count and slope = 2 * Q / count, behind the affine
template <int THREADS>
__device__ void copy_completion(const Conv3x3GradWeight& p, int first_channel, unsigned to) {
  float* const vectors = shared_at<float>(to) + 3 * kGradColumns;
  const float per_pixel = static_cast<float>(1 / p.count);
  for (int i = threadIdx.x; i < kGradColumns; i += THREADS) {
    const bool inside = first_channel + i < p.z.cols;
    vectors[i] = inside ? p.p[first_channel + i] * per_pixel : 0;
    vectors[kGradColumns + i] = inside ? 2 * p.q[first_channel + i] * per_pixel : 0;
  }
}

// f(place, row, whether it is in an image) for a thread's pieces of a tile, the same every time, of channels
// `threadIdx.x % 8 * 8`...
template <int THREADS, typename F>
__device__ void for_tile(const Tile& at, unsigned stage, F f) {
  constexpr int kStep = THREADS / kPieces;
  static_assert(kStep % 8 == 0);
  const unsigned piece = threadIdx.x % kPieces;
  int i = static_cast<int>(threadIdx.x) / kPieces;
  unsigned to = stage + piece / 2 * kGradTile * kRowBytes + place(i, piece % 2);
#pragma unroll 1
  for (; i < kGradTile; i += kStep, to += kStep * kRowBytes) f(to, at.row(i), at.inside(i));
}

// dz, `valid` adjacent values of it, completed by Z's, by mean, constant and slope
template <typename T>
__device__ void complete(T* dz, const T* z, int valid, const float* vectors, bool aligned) {
  const float *const mean = vectors, *const constant = vectors + 3 * kGradColumns,
                     *const slope = constant + kGradColumns;
  const auto completed = [&](T value, int i) {
    return narrow<T>(widen(value) + (constant[i] + slope[i] * (widen(z[i]) - mean[i])));
  };
  if (aligned && valid >= kPiece) {
    Pack<T, kPiece> values;
    values.load(dz, kPiece);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values.values[i] = completed(values.values[i], i);
    values.store(dz, kPiece);
  } else {
#pragma unroll 1
    for (int i = 0; i < kPiece && i < valid; ++i) dz[i] = completed(dz[i], i);
  }
}

template <typename T, int MT, int NT>
__device__ void multiply_tile(float (&acc)[MT][3][NT][4], const Conv3x3GradWeight& p, const WeightPlaces& places,
                              unsigned stage, int first_plane, int dy) {
  const unsigned lane = lane_of();
  const uint16_t* const taps = shared_at<uint16_t>(stage + places.taps);
  __syncwarp();  // its lanes have copied different numbers of pieces
  const unsigned step = (p.pixels.across == 0 ? 16 : p.pixels.pitch) * kRowBytes;
  unsigned pixel = (p.pixels.first + lane % 16) * kRowBytes + lane / 16 * 16;
  unsigned channels = stage + first_plane * kGradTile * kRowBytes + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll 2
  for (int i = 0; i < kGradTile; i += 16, pixel += step, channels += 16 * kRowBytes) {
    unsigned a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) load_matrices_transposed(a[m], channels + m * kGradTile * kRowBytes);
    const unsigned inside = taps[i + lane % 16];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const unsigned at = swapped(pixel + slots_to(3 * dy + dx, p.pixels.pitch) * static_cast<int>(kRowBytes));
#pragma unroll
      for (int n = 0; n < NT / 2; ++n) {
        unsigned b[4];
        load_matrices_transposed(b, inside >> (3 * dy + dx) & 1 ? stage + places.grad + n * places.grad_plane + at : 0);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply<T>(acc[m][dx][2 * n], a[m], b[0], b[1]);
          multiply<T>(acc[m][dx][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// A warp's products of three taps, 16 * MT channels and 8 * NT outputs into its range's [k, 3, 3, B]
template <int MT, int NT>
__device__ void store_products(const float (&acc)[MT][3][NT][4], const Conv3x3GradWeight& p, int first_channel,
                               int first_output, int dy) {
  const int lane = lane_of(), outputs = static_cast<int>(p.grad.cols), channels = static_cast<int>(p.z.cols);
  const int c = first_channel + lane / 4, last_tap = 8 - 3 * dy;  // dY's pixel seen from Z's, the other way round
  int j = first_output + lane % 4 * 2;
  float* to = p.partials + ((static_cast<int64_t>(blockIdx.y) * outputs + j) * 9 + last_tap) * channels + c;
#pragma unroll
  for (int n = 0; n < NT; ++n, j += 8, to += 8 * 9 * channels)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (j + e >= outputs) continue;
#pragma unroll
      for (int dx = 0; dx < 3; ++dx)
#pragma unroll
        for (int eighth = 0; eighth < 2 * MT; ++eighth)
          if (c + 8 * eighth < channels)
            to[(9 * e - dx) * channels + 8 * eighth] = acc[eighth / 2][dx][n][eighth % 2 * 2 + e];
    }
}

// 64 / (16 * MT) times three warps
template <typename T, int MT, int NT>
__global__ __launch_bounds__(384 / MT, MT) void bn_relu_conv3x3_grad_weight_kernel(const Conv3x3GradWeight p) {
  if constexpr (kHasTensorCores) {
    constexpr int kThreads = 384 / MT;
    const WeightPlaces places(p, 8 * NT);
    const int channel_blocks = static_cast<int>((p.z.cols + kGradColumns - 1) / kGradColumns);
    const int first_channel = static_cast<int>(blockIdx.x) % channel_blocks * kGradColumns;
    const int first_output = static_cast<int>(blockIdx.x) / channel_blocks * 8 * NT;
    const int warp = static_cast<int>(threadIdx.x) / 32, dy = warp % 3, first_plane = warp / 3 * MT;
    const bool completes = p.dz.data != nullptr && first_output == 0;
    const float* const vectors = shared_at<float>(places.vectors);
    zero_the_start();
    copy_affine<kThreads, T>(p.affine, p.z.cols, first_channel, kGradColumns, places.vectors);
    if (completes) copy_completion<kThreads>(p, first_channel, places.vectors);

    const int first = static_cast<int>(blockIdx.y) * p.tiles_each;
    const int last = first + p.tiles_each < p.pixels.tiles ? first + p.tiles_each : p.pixels.tiles;
    const int in_block = static_cast<int>(threadIdx.x) % kPieces * kPiece, channel = first_channel + in_block;
    const int valid = static_cast<int>(p.z.cols) - channel;
    const auto stage_of = [&](int tile) { return places.stages + (tile - first) % 2 * places.stage_bytes; };
    const auto copy_tile = [&](int tile) {
      const Tile at(p.pixels, tile);
      const unsigned stage = stage_of(tile);
      copy_pieces<false, T>(valid, p.aligned, [&](auto copy) {
        for_tile<kThreads>(at, stage, [&](unsigned piece, int r, bool inside) {
          if (inside)
            copy(piece, row<const T>(p.z, r, channel));
          else
            copy_at_once<T>(piece, nullptr, 0);
        });
      });
      for (int n = 0; n < NT / 2; ++n)
        copy_windows<kThreads, T>(p.grad, at, first_output + n * kPlane, stage + places.grad + n * places.grad_plane,
                                  p.grad_aligned);
      if (threadIdx.x < kGradTile)
        shared_at<uint16_t>(stage + places.taps)[threadIdx.x] = static_cast<uint16_t>(at.taps(threadIdx.x));
      commit_copies();
    };
    copy_tile(first);
    __syncthreads();  // the vectors are there

    float acc[MT][3][NT][4] = {};
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      const unsigned stage = stage_of(tile);
      wait_for_copies<0>();
      for_tile<kThreads>(Tile(p.pixels, tile), stage, [&](unsigned piece, int r, bool inside) {
        if (!inside) return;
        if (completes && valid > 0)
          complete(row<T>(p.dz, r, channel), shared_at<T>(piece), valid, vectors + in_block, p.aligned);
        bn_relu_piece(shared_at<T>(piece), PieceVectors<3>(vectors + in_block, kGradColumns));
      });
      __syncthreads();  // every thread's values are there, and nobody reads the other stage any more
      if (tile + 1 < last) copy_tile(tile + 1);
      multiply_tile<T>(acc, p, places, stage, first_plane, dy);
    }

    store_products<MT, NT>(acc, p, first_channel + kPlane * first_plane, first_output, dy);
  }
}

template <typename T, int MT, int NT>
const char* launch_grad_weight(const Conv3x3GradWeight& p, void* stream) {
  const int64_t channel_blocks = (p.z.cols + kGradColumns - 1) / kGradColumns;
  const int64_t output_blocks = (p.grad.cols + 8 * NT - 1) / (8 * NT);
  const dim3 grid(static_cast<unsigned>(channel_blocks * output_blocks), static_cast<unsigned>(p.ranges));
  const unsigned bytes = WeightPlaces(p, 8 * NT).bytes;
  return launch(bn_relu_conv3x3_grad_weight_kernel<T, MT, NT>, grid, dim3(384 / MT), bytes, stream, p);
}

}  // namespace

const char* bn_relu_conv3x3_grad_weight(const Conv3x3GradWeight& p, Type type, void* stream) {
  return by_half(type, [&]<typename T>(T) {
    if (p.grad.cols <= 16) return launch_grad_weight<T, 2, 2>(p, stream);
    return p.grad.cols <= 32 ? launch_grad_weight<T, 2, 4>(p, stream) : launch_grad_weight<T, 1, 6>(p, stream);
  });
}

}  // namespace densenet_fast::cuda
