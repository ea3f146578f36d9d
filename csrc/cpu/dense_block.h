// A whole dense block, forward and backward, for layers with a bottleneck, without biases or dropout, in one process.
//
// Example:
//
//   Tensor p = mean, q = var;
//   dense_block(out, 64, tensors, {1e-5, 1e-5}, {4, 8, 8}, {}, mean, var, true, false, x, {}, {});
//   dense_block_backward(out, out, out, {}, mean, var, 256, tensors, {1e-5, 1e-5}, {4, 8, 8}, 64, {}, tensors, p, q,
//                        true, false);
#pragma once

#include "matrices.h"

namespace densenet_fast {

// Fills the columns of features [M, C_total] but those of the block's input, which are there with their statistics
// unless `x` is given, the packed statistics, and the bottlenecks that are kept.
void dense_block(Tensor features, int64_t in_channels, std::vector<Tensor> tensors, std::vector<double> eps,
                 std::vector<int64_t> grid, std::vector<Tensor> bottlenecks, Tensor mean, Tensor var,
                 bool return_statistics, bool prepend, std::optional<Tensor> x, std::optional<Tensor> x_mean,
                 std::optional<Tensor> x_var);

// From grad [M, C_total]: grad_x [M, C0], allocated when all else is done unless it is given, and, in the places of
// `tensors`, float32, the gradients of the stages. Bottlenecks that were not kept it recomputes. G stands in `total`
// [M, C_total], which may be grad. p and q start with what came from behind the block.
Tensor dense_block_backward(Tensor grad, Tensor total, Tensor features, std::vector<Tensor> bottlenecks, Tensor mean,
                            Tensor var, double count, std::vector<Tensor> tensors, std::vector<double> eps,
                            std::vector<int64_t> grid, int64_t in_channels, std::optional<Tensor> grad_x,
                            std::vector<Tensor> gradients, Tensor p_packed, Tensor q_packed, bool return_statistics,
                            bool prepend);

}  // namespace densenet_fast
