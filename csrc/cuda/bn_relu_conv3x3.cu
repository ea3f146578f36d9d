// Y = conv3x3(relu(bn(Z)), W2) into columns of the block's buffer, with their statistics.
//
// A block makes a tile of pixels x N outputs, 16 channels at a time: Z's rows of the tile's windows come by
// asynchronous copies while the products of the 16 channels before run, are normalised and rectified where they stand,
// and are read from there nine times, as matrices whose rows are shifted. A warp owns 16 * MT pixels.
#include "planes.h"

namespace densenet_fast::cuda {
namespace {

// Where things stand in shared memory
struct ConvPlaces {
  unsigned vectors, stages, weights, stage_bytes, bytes;  // weights: from the start of a stage

  __host__ __device__ ConvPlaces(const Conv3x3& p, int tile, int columns, int threads) {
    vectors = kZerosBytes;
    stages = up_to_bank(vectors + 3 * sizeof(float) * kPlane * planes_of(p.z.cols));
    weights = up_to_bank(p.pixels.slots * kRowBytes);
    stage_bytes = weights + 9 * columns * kRowBytes;
    const unsigned out = tile * pitch(columns) + 2 * sizeof(float) * threads;  // it takes the stages' place
    bytes = stages + (out > 2 * stage_bytes ? out : 2 * stage_bytes);
  }
  // Bytes from row to row of the finished tile
  __host__ __device__ static constexpr unsigned pitch(int columns) { return 2 * columns + 16; }
};

// W2's 16 channels of N outputs: row tap * N + j of a plane
template <typename T, int N, int THREADS>
__device__ void copy_weight(const Conv3x3& p, int first_output, int first_channel, unsigned plane) {
  constexpr int kStep = THREADS / 2;
  const int left = static_cast<int>(p.out.cols) - first_output, channels = static_cast<int>(p.z.cols);
  const int c = first_channel + threadIdx.x % 2 * kPiece;
  const T* const from = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_output) * 9 * channels + c;
  copy_pieces<true, T>(channels - c, p.aligned, [&](auto copy) {
    int r = static_cast<int>(threadIdx.x) / 2;
    unsigned piece = plane + place(r, threadIdx.x % 2);
    for (; r < 9 * N; r += kStep, piece += kStep * kRowBytes) {
      const int tap = r / N, j = r % N;
      if (j < left)
        copy(piece, from + (j * 9 + tap) * channels);
      else
        copy_at_once(piece, from, 0);
    }
  });
}

// acc += the products of a stage
template <typename T, int MT, int NT>
__device__ void multiply_stage(float (&acc)[MT][NT][4], const unsigned (&pixel)[MT], const unsigned (&taps)[MT],
                               int pitch, unsigned plane, unsigned weights) {
  const unsigned lane = lane_of();
  const unsigned output = weights + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  __syncwarp();  // its lanes have copied different numbers of pieces
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    unsigned b[NT / 2][4];
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) load_matrices(b[n], output + (tap * 8 * NT + n * 16) * kRowBytes);
    const int away = slots_to(tap, pitch) * static_cast<int>(kRowBytes);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      unsigned a[4];
      load_matrices(a, taps[m] >> tap & 1 ? plane + swapped(pixel[m] + away) : 0);
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply<T>(acc[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// The accumulators, with bias and dropout, rounded, into a tile [R, N] of the given pitch
template <typename T, int MT, int NT>
__device__ void round_tile(const float (&acc)[MT][NT][4], const Conv3x3& p, const Tile& at, int first_pixel,
                           int first_output, unsigned tile) {
  const int lane = lane_of(), outputs = static_cast<int>(p.out.cols);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int i = first_pixel + m * 16 + lower * 8 + lane / 4;
      const uint8_t* keep = nullptr;
      if (p.keep != nullptr && at.inside(i)) {
        const Position pixel = at.position(i);
        keep = p.keep + pixel.image * p.keep_strides[0] + pixel.y * p.keep_strides[2] + pixel.x * p.keep_strides[3];
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        Pack<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = first_output + column + e;
          float sum = acc[m][n][2 * lower + e];
          if (p.bias != nullptr && j < outputs) sum += load<float>(p.bias, p.bias_type, j);
          if (keep != nullptr && j < outputs) sum *= keep[j * p.keep_strides[1]] ? p.keep_scale : 0.0f;
          pair.values[e] = narrow<T>(sum);
        }
        pair.store(shared_at<T>(tile + i * ConvPlaces::pitch(8 * NT)) + column, 2);
      }
    }
}

// The sums over the tile's pixels of value(row's two adjacent columns), for the pair of columns of this thread; all
// threads take part. `sums` has room for two of every thread.
template <int R, int N, int THREADS, typename Value>
__device__ float2 column_sums(const Tile& at, const unsigned char* tile, float* sums, Value value) {
  constexpr int kPairs = N / 2, kGroups = THREADS / kPairs;
  const int pair = threadIdx.x % kPairs, group = threadIdx.x / kPairs;
  float2 sum{0, 0};
  if (group < kGroups)
    for (int i = group; i < R; i += kGroups)
      if (at.inside(i)) value(tile + i * ConvPlaces::pitch(N) + 4 * pair, sum);
  sums[2 * threadIdx.x] = sum.x;
  sums[2 * threadIdx.x + 1] = sum.y;
  __syncthreads();
  sum = {0, 0};
  for (int g = 0; g < kGroups; ++g) {
    sum.x += sums[2 * (g * kPairs + pair)];
    sum.y += sums[2 * (g * kPairs + pair) + 1];
  }
  __syncthreads();
  return sum;
}

// partials [tiles, 2, k] = the mean and centred second moment of the finished tile's columns
template <typename T, int R, int N, int THREADS>
__device__ void store_moments(const Conv3x3& p, const Tile& at, int first_output, const unsigned char* tile,
                              float* sums) {
  const int count = at.count();
  const auto both = [](const unsigned char* values) {
    Pack<T, 2> pack;
    pack.load(reinterpret_cast<const T*>(values), 2);
    return float2{widen(pack.values[0]), widen(pack.values[1])};
  };
  const float2 sum = column_sums<R, N, THREADS>(at, tile, sums, [&](const unsigned char* values, float2& s) {
    const float2 v = both(values);
    s.x += v.x, s.y += v.y;
  });
  const float2 mean{sum.x / count, sum.y / count};
  const float2 m2 = column_sums<R, N, THREADS>(at, tile, sums, [&](const unsigned char* values, float2& s) {
    const float2 v = both(values);
    s.x += (v.x - mean.x) * (v.x - mean.x), s.y += (v.y - mean.y) * (v.y - mean.y);
  });
  const int64_t j = first_output + 2 * threadIdx.x, k = p.out.cols;
  if (threadIdx.x >= N / 2) return;
  float* partial = static_cast<float*>(p.partials) + static_cast<int64_t>(blockIdx.x) * 2 * k + j;
  if (j < k) partial[0] = mean.x, partial[k] = m2.x;
  if (j + 1 < k) partial[1] = mean.y, partial[k + 1] = m2.y;
}

// Blocks that a multiprocessor has registers for
constexpr int resident(int warps, int m_tiles, int n_tiles) { return warps == 8 ? 2 : m_tiles * n_tiles <= 8 ? 4 : 3; }

template <typename T, int WARPS, int MT, int NT>
__global__ __launch_bounds__(32 * WARPS, resident(WARPS, MT, NT)) void bn_relu_conv3x3_kernel(const Conv3x3 p) {
  if constexpr (kHasTensorCores) {
    constexpr int R = 16 * MT * WARPS, N = 8 * NT, kThreads = 32 * WARPS;
    const ConvPlaces places(p, R, N, kThreads);
    const Tile at(p.pixels, static_cast<int>(blockIdx.x));
    const int first_output = static_cast<int>(blockIdx.y) * N, lane = lane_of();
    const int first_pixel = static_cast<int>(threadIdx.x) / 32 * 16 * MT;
    const int planes = planes_of(p.z.cols), padded = planes * kPlane;
    unsigned pixel[MT], taps[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const int i = first_pixel + m * 16 + lane % 16;
      pixel[m] = at.slot(i) * kRowBytes + lane / 16 * 16;
      taps[m] = at.taps(i);
    }
    const bool normalises = p.affine.mean != nullptr;
    zero_the_start();
    if (normalises) copy_affine<kThreads, T>(p.affine, p.z.cols, 0, padded, places.vectors);
    const auto stage_of = [&](int c) { return places.stages + c % 2 * places.stage_bytes; };
    const auto copy_stage = [&](int c) {
      copy_windows<kThreads, T>(p.z, at, c * kPlane, stage_of(c), p.aligned);
      copy_weight<T, N, kThreads>(p, first_output, c * kPlane, stage_of(c) + places.weights);
      commit_copies();
    };
    copy_stage(0);
    __syncthreads();  // the affine is there

    float acc[MT][NT][4] = {};
#pragma unroll 1
    for (int c = 0; c < planes; ++c) {
      wait_for_copies<0>();
      if (normalises) {
        const int channel = c * kPlane + threadIdx.x % 2 * kPiece;
        const PieceVectors<3> vectors(shared_at<float>(places.vectors) + channel, padded);
        for_windows<kThreads>(at, stage_of(c),
                              [&](unsigned piece, int) { bn_relu_piece(shared_at<T>(piece), vectors); });
      }
      __syncthreads();  // every thread's values are there, and nobody reads the other stage any more
      if (c + 1 < planes) copy_stage(c + 1);
      multiply_stage<T>(acc, pixel, taps, p.pixels.pitch, stage_of(c), stage_of(c) + places.weights);
    }

    __syncthreads();  // the tile takes the stages' place
    constexpr unsigned kPitch = ConvPlaces::pitch(N);
    const unsigned tile = places.stages;
    round_tile<T>(acc, p, at, first_pixel, first_output, tile);
    __syncthreads();
    if (p.partials != nullptr)
      store_moments<T, R, N, kThreads>(p, at, first_output, shared_at<unsigned char>(tile),
                                       shared_at<float>(tile + R * kPitch));
    for (int e = threadIdx.x; e < R * NT; e += kThreads) {
      const int i = e / NT, column = e % NT * kPiece, valid = static_cast<int>(p.out.cols) - first_output - column;
      if (at.inside(i) && valid > 0)
        store_piece(tile + i * kPitch + 2 * column, row<T>(p.out, at.row(i), first_output + column), valid,
                    p.out_width);
    }
  }
}

template <typename T, int WARPS, int MT, int NT>
const char* launch_conv(const Conv3x3& p, void* stream) {
  const ConvPlaces places(p, 16 * MT * WARPS, 8 * NT, 32 * WARPS);
  const dim3 grid(static_cast<unsigned>(p.pixels.tiles), static_cast<unsigned>((p.out.cols + 8 * NT - 1) / (8 * NT)));
  return launch(bn_relu_conv3x3_kernel<T, WARPS, MT, NT>, grid, dim3(32 * WARPS), places.bytes, stream, p);
}

}  // namespace

const char* bn_relu_conv3x3(const Conv3x3& p, Type type, void* stream) {
  static_assert(kConvTile == 256 && kSmallConvTile == 64);
  return by_half(type, [&]<typename T>(T) {
    const bool large = p.pixels.tile == kConvTile;
    if (p.out.cols <= 16) return large ? launch_conv<T, 4, 4, 2>(p, stream) : launch_conv<T, 4, 1, 2>(p, stream);
    if (p.out.cols <= 32) return large ? launch_conv<T, 4, 4, 4>(p, stream) : launch_conv<T, 4, 1, 4>(p, stream);
    return large ? launch_conv<T, 8, 2, 6>(p, stream) : launch_conv<T, 4, 1, 6>(p, stream);
  });
}

}  // namespace densenet_fast::cuda
