// The 3x3 convolution and its gradients for float16 and bfloat16, by tensor cores (compute capability 8.0 and up):
//
//   Y[p, j] = sum_{dy, dx, b} A[p + dy * W + dx, b] * W2[j, dy, dx, b]     with A = relu(bn(Z))
//   D[p, b] = (bn(Z)[p, b] > 0) * sum_{dy, dx, j} dY[p - dy * W - dx, j] * W2[j, dy, dx, b]
//   dW2[j, dy, dx, b] = sum_p dY[p - dy * W - dx, j] * A[p, b]
//
// over the taps dy, dx in -1..1 that stay inside the image. A is made in shared memory, from the tile of Z that stands
// there, and never written to memory. The structs are of the kind of kernels.h; no torch and no CUDA in this file.
#pragma once

#include "kernels.h"

namespace densenet_fast::cuda {

// Y, with bias and dropout if asked for, and the mean and centred second moment of each tile as stored
struct Conv3x3 {
  Matrix z;             // [M, B]
  Affine affine;        // without a mean, A = Z
  const void* weight;   // [k, 3, 3, B]
  const void* bias;     // [k] or null
  const uint8_t* keep;  // [N, k, H, W] or null
  int64_t keep_strides[4];
  float keep_scale;
  Type bias_type;
  Matrix out;      // [M, k]
  void* partials;  // [tiles, 2, k] float, or null
  Pixels pixels;
  bool aligned;   // whether rows of Z and W2 start at multiples of 16 bytes
  int out_width;  // elements of Y that are adjacent at a multiple of their bytes, 8, 4 or 1
};
const char* bn_relu_conv3x3(const Conv3x3& p, Type type, void* stream);

// The pixels of a tile, where there are enough of them for every multiprocessor, and where not
constexpr int kConvTile = 256, kSmallConvTile = 64;

// scale * D, and its column sums: partials [blocks, 2, B] = sum D, sum D * (Z - mean)
struct Conv3x3GradInput {
  Matrix grad, z;  // dY [M, k], [M, B]
  Affine affine;
  const void* weight;  // [k, 3, 3, B]
  Matrix scaled;       // [M, B]
  float* partials;     // [blocks, 2, B]
  Pixels pixels;
  int blocks;
  bool aligned, grad_aligned;  // whether rows of Z and W2, and of dY, start at multiples of 16 bytes
  int scaled_width;            // elements of scale * D that are adjacent at a multiple of their bytes, 8, 4 or 1
};
const char* bn_relu_conv3x3_grad_input(const Conv3x3GradInput& p, Type type, void* stream);

// The pixels of a tile of the gradients, or half as many, and the columns of Z that a block owns
constexpr int kGradTile = 128, kGradColumns = 64;
// The most columns of dY whose part of W2 fits the shared memory of every GPU
constexpr int kMostGradColumns = 48;

// dW2 in parts, each of `tiles_each` tiles: partials [ranges, k, 3, 3, B] float; and, if there is a dz, completes it:
//
//   dZ = dz + (P + 2 * Q * (Z - mean)) / count
struct Conv3x3GradWeight {
  Matrix grad, z;  // dY [M, k], [M, B]
  Affine affine;
  float* partials;     // [ranges, k, 3, 3, B]
  Matrix dz;           // [M, B], or its data is null
  const float *p, *q;  // [B]
  double count;
  Pixels pixels;
  int ranges, tiles_each;
  bool aligned, grad_aligned;  // whether rows of Z and dz, and of dY, start at multiples of 16 bytes
};
const char* bn_relu_conv3x3_grad_weight(const Conv3x3GradWeight& p, Type type, void* stream);

}  // namespace densenet_fast::cuda
