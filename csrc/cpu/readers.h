// What reads a dense block: the transition, and the head with its mean over an image's pixels. Forward and backward.
//
// Example:
//
//   const Affine bn = affine(mean, scale, shift, x.size(1));
//   const Tensor means = head(x, bn, 4);                                            // of 4 images
//   const Tensor halved = transition(x, bn, weight, nullptr, {4, 8, 8}, nullptr);  // of 4 images of 8x8 pixels
#pragma once

#include <tuple>

#include "statistics.h"

namespace densenet_fast {

// mean(relu(y)) @ weight^T + bias [M', C'] for y = bn(x) [M, C], with its statistics unless null; `grid` is (N,
// *spatial)
Tensor transition(const Tensor& x, Affine affine, const Tensor& weight, const float* bias,
                  const std::vector<int64_t>& grid, const StatisticsOutput* statistics);

// With D = (grad @ weight) / window * (y > 0) at each pixel of a window: scale * D [M, C] and
// (sum D, sum D * (x - mean)), which are empty if they are not needed; and dW [C', C], unless null
std::tuple<Tensor, Tensor> transition_backward(const Tensor& grad, const Tensor& x, Affine affine, const Tensor& weight,
                                               const std::vector<int64_t>& grid, bool need_input, float* grad_weight);

// Means of relu(y) over the pixels of each image [N, C]
Tensor head(const Tensor& x, Affine affine, int64_t images);

// With D, each pixel's share of the gradient of its image's means where y > 0: scale * D [M, C] and
// (sum D, sum D * (x - mean))
std::tuple<Tensor, Tensor> head_backward(const Tensor& grad, const Tensor& x, Affine affine);

}  // namespace densenet_fast
