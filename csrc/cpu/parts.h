// The parts of a network in training, each in one call.
//
// Example:
//
//   const Tensor map = convolution(x, weight, 2, 3);  // of images [4, 3, 16, 16]
//   const auto [maxima, positions, of_map, var_of_map, m, v] =
//       bn_relu_maxpool_stage(map, {}, {}, tensors, 1e-5, {4, 8, 8}, true);
//   const std::vector<Tensor> layer(2 * kStageTensors, weight);
//   const BlockAndReader parts = {layer, {1e-5, 1e-5}, {4, 4, 4}, {1}, false, tensors, 1e-5};
//   const Tensor halved = dense_block_and_reader(parts, maxima, m, v, false).out;
#pragma once

#include <tuple>

#include "stage.h"

namespace densenet_fast {

// The convolution [N * H' * W', B] of images [N, C, H, W] and a weight [B, kernel, kernel, C]
Tensor convolution(Tensor images, Tensor weight, int64_t stride, int64_t padding);

// From grad [N * H' * W', B]: the gradient of the weight [B, kernel, kernel, C], float32
Tensor convolution_grad_weight(Tensor grad, Tensor images, Tensor weight, int64_t stride, int64_t padding);

// For x [M, C]: the maxima [M', C] and their positions; the mean and the variance of x, which are the given ones if
// there are such and zero if the stage is frozen; and those of the maxima, empty unless asked for
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_relu_maxpool_stage(Tensor x, std::optional<Tensor> x_mean,
                                                                                 std::optional<Tensor> x_var,
                                                                                 std::vector<Tensor> tensors,
                                                                                 double eps, std::vector<int64_t> grid,
                                                                                 bool return_statistics);

// The gradient of x [M, C], what reaches it through its statistics included, and those of weight and bias, where there
// are such
std::tuple<Tensor, std::vector<Tensor>> bn_relu_maxpool_stage_backward(Tensor grad, Tensor argmax, Tensor x,
                                                                       Tensor mean, Tensor var,
                                                                       std::vector<Tensor> tensors, double eps,
                                                                       std::vector<int64_t> grid);

// A block's layers, and the transition or the head behind them
struct BlockAndReader {
  std::vector<Tensor> tensors;  // of all stages of the block
  std::vector<double> eps;
  std::vector<int64_t> grid, saved;  // for each layer, whether its bottleneck is kept
  bool prepend;
  std::vector<Tensor> read_tensors;
  double read_eps;
};

// What the forward pass makes; `mean` and `var` are those of the reader's result, empty unless asked for
struct Made {
  Tensor features, packed_mean, packed_var;
  std::vector<Tensor> bottlenecks;
  Tensor out, mean, var;
};

Made dense_block_and_reader(const BlockAndReader& parts, const Tensor& x, const std::optional<Tensor>& x_mean,
                            const std::optional<Tensor>& x_var, bool return_statistics);

// From the gradient of the reader's result [M', C']: the gradient of the block's input [M, C0], and those of the
// tensors of the block and of the reader, of each that has one
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> dense_block_and_reader_backward(
    const BlockAndReader& parts, const Tensor& grad, const Tensor& features, const Tensor& mean, const Tensor& var,
    const std::vector<Tensor>& bottlenecks, int64_t in_channels);

}  // namespace densenet_fast
