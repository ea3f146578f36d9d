// The gradient of Y = conv3x3(relu(bn(Z)), W2) with respect to W2, from dY, in parts; and on the way dZ, completed by
// what passes through its statistics, from the Z that is at hand:
//
//   dW2[j, dy, dx, b] = sum_p dY[p - dy * W - dx, j] * relu(bn(Z))[p, b]
//   dZ = dz + (P + 2 * Q * (Z - mean)) / count
//
// A block of six warps owns 64 channels, 8 * NT outputs and a range of tiles of pixels. The next tile of Z and the next
// windows of dY come while a tile's products run. A warp owns 32 of the channels and the three taps of one dy, whose
// products it keeps in registers until the end of the range.
#include "planes.h"

namespace densenet_fast::cuda {
namespace {

constexpr int kWeightThreads = 192;
constexpr int kVectors = 5;  // mean, scale, bias, constant and slope

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
__device__ void copy_completion(const Conv3x3GradWeight& p, int first_channel, unsigned to) {
  float* const vectors = shared_at<float>(to) + 3 * kGradColumns;
  const float count = static_cast<float>(p.count);
  for (int i = threadIdx.x; i < kGradColumns; i += kWeightThreads) {
    const bool inside = first_channel + i < p.z.cols;
    vectors[i] = inside ? p.p[first_channel + i] / count : 0;
    vectors[kGradColumns + i] = inside ? 2 * p.q[first_channel + i] / count : 0;
  }
}

// f(place, row, channel in the block) for every eight adjacent channels of a tile, the same for the same thread every
// time; row -1 outside of the images
template <typename F>
__device__ void for_tile(const Tile& at, unsigned stage, F f) {
  constexpr int kPieces = kGradColumns / 8;
  for (int e = threadIdx.x; e < kGradTile * kPieces; e += kWeightThreads) {
    const int i = e / kPieces, piece = e % kPieces;
    f(stage + piece / 2 * kGradTile * kRowBytes + place(i, piece % 2), at.row(i), piece * 8);
  }
}

// dz, eight adjacent values of it, completed by Z's
template <typename T>
__device__ void complete(const Conv3x3GradWeight& p, const T* z, int64_t r, int first_channel, const float* vectors) {
  const int valid = static_cast<int>(p.z.cols) - first_channel;
  if (valid <= 0) return;
  T* const to = row<T>(p.dz, r, first_channel);
  Pack<T, 8> values, x;
  x.load(z, 8);
  if (p.aligned) {
    values.load(to, valid);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values.values[i] = i < valid ? to[i] : T();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float through =
        vectors[3 * kGradColumns + i] + vectors[4 * kGradColumns + i] * (widen(x.values[i]) - vectors[i]);
    values.values[i] = narrow<T>(widen(values.values[i]) + through);
  }
  store_eight(values, to, valid, p.aligned ? 8 : 1);
}

template <typename T, int NT>
__device__ void multiply_tile(float (&acc)[2][3][NT][4], const Conv3x3GradWeight& p, const WeightPlaces& places,
                              unsigned stage, int first_plane, int dy) {
  const unsigned lane = lane_of();
  const uint16_t* const taps = shared_at<uint16_t>(stage + places.taps);
  const unsigned step = (p.pixels.across == 0 ? 16 : p.pixels.pitch) * kRowBytes;
  unsigned pixel = (p.pixels.first + lane % 16) * kRowBytes + lane / 16 * 16;
  unsigned channels = stage + first_plane * kGradTile * kRowBytes + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  for (int i = 0; i < kGradTile; i += 16, pixel += step, channels += 16 * kRowBytes) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices_transposed(a[m], channels + m * kGradTile * kRowBytes);
    const unsigned inside = taps[i + lane % 16];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const unsigned at = swapped(pixel + slots_to(3 * dy + dx, p.pixels.pitch) * static_cast<int>(kRowBytes));
#pragma unroll
      for (int n = 0; n < NT / 2; ++n) {
        unsigned b[4];
        load_matrices_transposed(b, inside >> (3 * dy + dx) & 1 ? stage + places.grad + n * places.grad_plane + at : 0);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<T>(acc[m][dx][2 * n], a[m], b[0], b[1]);
          multiply<T>(acc[m][dx][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

template <typename T, int NT>
__global__ __launch_bounds__(kWeightThreads, 2) void conv3x3_grad_weight_kernel(const Conv3x3GradWeight p) {
  if constexpr (kHasTensorCores) {
    const WeightPlaces places(p, 8 * NT);
    const int channel_blocks = static_cast<int>((p.z.cols + kGradColumns - 1) / kGradColumns);
    const int first_channel = static_cast<int>(blockIdx.x) % channel_blocks * kGradColumns;
    const int first_output = static_cast<int>(blockIdx.x) / channel_blocks * 8 * NT;
    const int warp = static_cast<int>(threadIdx.x) / 32, dy = warp % 3, half = warp / 3;
    const bool completes = p.dz.data != nullptr && first_output == 0;
    const float* const vectors = shared_at<float>(places.vectors);
    zero_the_start();
    copy_affine<kWeightThreads, T>(p.affine, p.z.cols, first_channel, kGradColumns, places.vectors);
    if (completes) copy_completion(p, first_channel, places.vectors);

    const int64_t first = static_cast<int64_t>(blockIdx.y) * p.tiles_each;
    const int64_t last = first + p.tiles_each < p.pixels.tiles ? first + p.tiles_each : p.pixels.tiles;
    const auto stage_of = [&](int64_t tile) {
      return places.stages + static_cast<unsigned>((tile - first) % 2) * places.stage_bytes;
    };
    const auto copy_tile = [&](int64_t tile) {
      const Tile at(p.pixels, tile);
      const unsigned stage = stage_of(tile);
      for_tile(at, stage, [&](unsigned to, int64_t r, int c) {
        const int valid = r >= 0 ? static_cast<int>(p.z.cols) - first_channel - c : 0;
        copy_eight<false>(to, row<const T>(p.z, r, first_channel + c), valid, p.aligned);
      });
      for (int n = 0; n < NT / 2; ++n)
        copy_windows<kWeightThreads, T>(p.grad, at, first_output + n * kPlane,
                                        stage + places.grad + n * places.grad_plane, p.grad_aligned);
      for (int i = threadIdx.x; i < kGradTile; i += kWeightThreads)
        shared_at<uint16_t>(stage + places.taps)[i] = static_cast<uint16_t>(at.taps(i));
      commit_copies();
    };
    copy_tile(first);
    __syncthreads();  // the vectors are there

    float acc[2][3][NT][4] = {};
    for (int64_t tile = first; tile < last; ++tile) {
      const unsigned stage = stage_of(tile);
      wait_for_copies<0>();
      for_tile(Tile(p.pixels, tile), stage, [&](unsigned from, int64_t r, int c) {
        if (r < 0) return;
        T* const values = shared_at<T>(from);
        if (completes) complete(p, values, r, first_channel + c, vectors + c);
        bn_relu_eight(values, vectors + c, kGradColumns);
      });
      __syncthreads();  // every thread's values are there, and nobody reads the other stage any more
      if (tile + 1 < last) copy_tile(tile + 1);
      multiply_tile<T>(acc, p, places, stage, 2 * half, dy);
    }

    const int lane = static_cast<int>(lane_of());
    float* const partial = p.partials + static_cast<int64_t>(blockIdx.y) * p.grad.cols * 9 * p.z.cols;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int dx = 0; dx < 3; ++dx)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int64_t c = first_channel + 32 * half + 16 * m + e / 2 * 8 + lane / 4;
            const int64_t j = first_output + n * 8 + lane % 4 * 2 + e % 2;
            const int tap = 8 - (3 * dy + dx);  // dY's pixel seen from Z's, the other way round
            if (c < p.z.cols && j < p.grad.cols) partial[(j * 9 + tap) * p.z.cols + c] = acc[m][dx][n][e];
          }
  }
}

template <typename T, int NT>
const char* launch_grad_weight(const Conv3x3GradWeight& p, void* stream) {
  const int64_t channel_blocks = (p.z.cols + kGradColumns - 1) / kGradColumns;
  const int64_t output_blocks = (p.grad.cols + 8 * NT - 1) / (8 * NT);
  const dim3 grid(static_cast<unsigned>(channel_blocks * output_blocks), static_cast<unsigned>(p.ranges));
  const unsigned bytes = WeightPlaces(p, 8 * NT).bytes;
  return launch(conv3x3_grad_weight_kernel<T, NT>, grid, dim3(kWeightThreads), bytes, stream, p);
}

}  // namespace

const char* bn_relu_conv3x3_grad_weight(const Conv3x3GradWeight& p, Type type, void* stream) {
  return by_half(type, [&]<typename T>(T) {
    if (p.grad.cols <= 16) return launch_grad_weight<T, 2>(p, stream);
    return p.grad.cols <= 32 ? launch_grad_weight<T, 4>(p, stream) : launch_grad_weight<T, 6>(p, stream);
  });
}

}  // namespace densenet_fast::cuda
