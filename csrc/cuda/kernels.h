// The kernels of the CUDA backend as plain functions on pointers: what is bound by bandwidth, not by a product. Each
// launches on `stream`, a cudaStream_t of the current device, and returns what went wrong, or null. No torch and no
// CUDA in this file.
//
// A matrix has one row per pixel and adjacent columns, `ld` elements from row to row. Statistics, sums and an affine's
// vectors are of the accumulation type: double for double, float for the rest.
#pragma once

#include <cstdint>

namespace densenet_fast::cuda {

enum class Type : uint8_t { f32, f64, f16, bf16 };

struct Matrix {
  void* data;  // [rows, cols]
  int64_t rows, cols, ld;
};

// Rows of up to four dimensions, the first one slowest, whose columns are `column` elements apart
struct Strided {
  void* data;  // [sizes[0], ..., columns]
  int dims;
  int64_t sizes[4], strides[4], column;
};

// y = (x - mean) * scale + bias with scale = weight * rstd, [cols] each; mean and rstd of the accumulation type, bias
// and weight too unless they are narrow, of the matrix's
struct Affine {
  const void *mean, *rstd, *bias, *weight;  // [cols] each; without a weight, scale = rstd
  bool narrow_bias, narrow_weight;
};

// Where the gradients through one normalisation go; null: not asked for
struct Reader {
  const void *p_before, *q_before;  // [cols] of the accumulation type; null: zero; may be p and q
  void *p, *q;                      // [cols], of the accumulation type
  void *weight, *bias;              // [cols]
  Type weight_type, bias_type;
};

// Pixels of a batch of images, and the maxima over windows of 3 at distance 2, padded by 1. A missing dimension has
// size 1, and positions in a window count from 0 along the given ones: `centre` is the place of its middle along the
// missing ones.
struct Pooling {
  int sizes[3], pooled[3], centre;
};

// The pixels of a batch of images, rows of a matrix, divided into tiles of up to `tile` for a convolution over windows
// of 3x3. Narrow images: consecutive pixels, across images. Wide ones: 16 pixels of each of tile / 16 rows of an image.
// The pixels that a tile's windows hold have `slots` numbers: a pixel's, `first` for the tile's first, and those of its
// neighbours 1 and `pitch` apart.
struct Pixels {
  int rows, tiles;
  int height, width, tile;
  int across, down;  // tiles of an image, if they are of one image each; or 0
  int pitch, first, slots;
};

// Of images x height x width pixels
Pixels pixels(int64_t images, int64_t height, int64_t width, int tile);

// Rows divided into `tiles` of `tile_rows`, whose partial results are combined in the order of the tiles, and columns
// into blocks of x lanes; y rows at a time. Depends on nothing but the shape.
struct Tiling {
  int64_t tiles, tile_rows;
  int x, y, column_blocks;
};

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // rows of a lane that are read at once
constexpr int kReductionBlocks = 1024;
constexpr int kElementwiseBlocks = 4096;

// For `width` adjacent columns a lane, in at most about `blocks` blocks
Tiling tiling(int64_t rows, int64_t cols, int width, int64_t blocks);

// out = source * (mask ? keep_scale : 0), and partials [tiles, 2, cols] = mean and centred second moment of each tile
// of what was stored; without an out, of the source
struct Append {
  Strided source;
  Strided mask;  // of bytes; without data, nothing is dropped
  double keep_scale;
  Matrix out;      // its data may be null
  void* partials;  // [tiles, 2, cols], or null
  Tiling tiling;
  int width;
  bool transposed;  // the source's rows, not its columns, are adjacent
};
const char* append(const Append& p, Type type, void* stream);

// mean, biased variance and rstd = 1 / sqrt(var + eps) [cols] of all tiles
struct CombineStatistics {
  const void* partials;     // [tiles, 2, cols]
  void *mean, *var, *rstd;  // [cols]
  double eps;
  int64_t rows, cols;
  Tiling tiling;
  Pixels pixels;  // whose tiles they are of; without any, of the tiling's
};
const char* combine_statistics(const CombineStatistics& p, Type type, void* stream);

// out = grad + (p + 2 * q * (x - mean)) / count
struct Finalise {
  Matrix grad, x, out;         // out may be grad
  const void *mean, *p, *q;    // [cols]
  const double* count_tensor;  // on the device; or null:
  double count;
  Tiling tiling;
  int width;
};
const char* finalise(const Finalise& p, Type type, void* stream);

// sum_d, sum_dx [cols] = the sums of all tiles, sum D and sum D * (x - mean), and what the reader asks for:
// p = p_before - scale * sum D, q = q_before - scale * rstd^2 * sum D * (x - mean) / 2
// weight = rstd * sum D * (x - mean), bias = sum D
struct CombineSums {
  const void* partials;  // [tiles, 2, cols]
  void *sum_d, *sum_dx;  // [cols], or null
  Affine affine;
  Reader reader;
  int64_t tiles, cols;
};
const char* combine_sums(const CombineSums& p, Type type, void* stream);

// out = maxima of relu(y), argmax = their positions in their windows, both contiguous; partials [tiles, 2, cols] = mean
// and centred second moment of each tile of what was stored
struct MaxPool {
  Matrix x, out;
  uint8_t* argmax;  // [out.rows, cols]
  Affine affine;
  Pooling pooling;
  void* partials;  // [tiles, 2, cols], or null
  Tiling tiling;
  int width;
};
const char* bn_relu_maxpool(const MaxPool& p, Type type, void* stream);

// D = (sum of the gradients of the outputs that a pixel is the maximum of, or its image's gradient / pixels) * (y > 0):
// out = scale * D, partials [tiles, 2, cols] = sum D, sum D * (x - mean)
struct PoolBackward {
  Matrix grad, x, out;
  const uint8_t* argmax;  // [grad.rows, cols], or null, for the mean over an image
  Affine affine;
  Pooling pooling;
  int64_t pixels;
  void* partials;  // [tiles, 2, cols]
  Tiling tiling;
  int width;
};
const char* bn_relu_pool_backward(const PoolBackward& p, Type type, void* stream);

// out = means of relu(y) over the pixels of each image
struct AveragePool {
  Matrix x, out;
  Affine affine;
  int64_t pixels;
  Tiling tiling;
  int width;
};
const char* bn_relu_global_avgpool(const AveragePool& p, Type type, void* stream);

// Vectors and weights made before the kernels that read them
enum class Making : uint8_t { copy, rstd, zero };

// target = source, target = 1 / sqrt(source + eps) or target = 0, of k * columns * taps elements. The target is dense,
// of rows [taps, columns] if it is channels last, else [columns, taps].
struct Job {
  const void* source;  // [k, columns, taps], of any strides
  void* target;        // [k, taps, columns] or [k, columns, taps]
  double eps;
  int32_t k, columns;
  int32_t strides[5];  // the source's: of k, columns and the taps
  uint8_t taps[3];
  Making making : 2;
  Type source_type : 2, target_type : 2;
  bool channels_last : 1;
};
constexpr int kJobs = 64;
struct Prepare {
  Job jobs[kJobs];
};
static_assert(sizeof(Prepare) < 4096, "what a kernel's parameters may hold");
const char* prepare(const Prepare& p, int count, void* stream);

// The running statistics [cols] of one normalisation
struct Running {
  void *mean, *var;  // [cols]
  int64_t* batches;  // [] or null
  double momentum;   // NaN: 1 / batches
  int32_t start, cols;
  Type mean_type, var_type;
  unsigned char batch;
};
// The statistics of a batch, of the accumulation type
struct Batch {
  const void *mean, *var;      // [cols] of all that it normalised, one behind another
  const double* count_tensor;  // rows, on the device; or null:
  double count;
};
constexpr int kRunning = 64, kBatches = 16;
// batches += 1; running += momentum * (batch - running), var unbiased, with columns start... of its batch
struct UpdateRunning {
  Batch batches[kBatches];
  Running running[kRunning];
};
static_assert(sizeof(UpdateRunning) < 4096, "what a kernel's parameters may hold");
const char* update_running_statistics(const UpdateRunning& p, int count, Type type, void* stream);

}  // namespace densenet_fast::cuda
