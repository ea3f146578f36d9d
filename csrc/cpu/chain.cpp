// A dense block and the transition or the head behind it, in one call: the bodies of densenet_fast/ops/chain.py. Each
// of the vectors between the two ops would take longer as a tensor of Python's than a kernel of a small network.
#include "dense_block.h"
#include "parts.h"
#include "readers.h"
#include "results.h"

namespace densenet_fast {
namespace {

using Sizes = std::vector<int64_t>;

// One for each layer, empty where it is not kept, from those that are
std::vector<Tensor> for_each_layer(const std::vector<Tensor>& kept, const Sizes& saved, const Tensor& like) {
  std::vector<Tensor> all(saved.size(), nothing(like));
  size_t next = 0;
  for (size_t i = 0; i < saved.size(); ++i) {
    if (saved[i]) all[i] = kept.at(next++);
  }
  return all;
}

Norm reader(const BlockAndReader& parts, int64_t cols) {
  const std::vector<Tensor>& tensors = parts.read_tensors;
  STD_TORCH_CHECK(tensors.size() == kStageTensors, "read_tensors: expected six, got ", tensors.size());
  STD_TORCH_CHECK(tensors[4].is_contiguous() && tensors[5].numel() == 0,
                  "read_tensors: expected a contiguous weight and no bias");
  return {tensors.data(), parts.read_eps, cols};
}

}  // namespace

Made dense_block_and_reader(const BlockAndReader& parts, const Tensor& x, const std::optional<Tensor>& x_mean,
                            const std::optional<Tensor>& x_var, bool return_statistics) {
  const Sizes &grid = parts.grid, &saved = parts.saved;
  STD_TORCH_CHECK(parts.eps.size() == 2 * saved.size() && parts.tensors.size() == kStageTensors * parts.eps.size(),
                  "eps: expected one for each of two stages a layer");
  const int64_t rows = x.size(0), in_channels = x.size(1);
  int64_t columns = in_channels, packed = 0;
  std::vector<Tensor> bottlenecks;
  for (size_t i = 0; i < saved.size(); ++i) {
    const Tensor *first = &parts.tensors[2 * i * kStageTensors], *second = first + kStageTensors;
    const int64_t width = first[4].size(0);
    if (saved[i]) bottlenecks.push_back(empty(x, {rows, width}));
    columns += second[4].size(0);
    packed += width;
  }
  packed += columns;
  const Norm norm = reader(parts, columns);
  const Tensor& conv = parts.read_tensors[4];
  const Tensor features = empty(x, {rows, columns});
  const Tensor mean = new_vector(x, packed), var = new_vector(x, packed);
  dense_block(features, in_channels, parts.tensors, parts.eps, grid, for_each_layer(bottlenecks, saved, x), mean, var,
              !norm.frozen(), parts.prepend, x, x_mean, x_var);

  const Folded folded = norm.fold(vector(mean, packed, "mean"), vector(var, packed, "var"));
  const int64_t own_cols = return_statistics ? conv.size(0) : 0;
  Tensor out_mean = new_floats(x, {own_cols}), out_var = new_floats(x, {own_cols});
  std::vector<float> rstd(own_cols);
  const StatisticsOutput statistics(floats_of(out_mean), floats_of(out_var), rstd.data(), 0);
  const Tensor out = conv.numel() == 0 ? head(features, folded.affine(), grid.at(0))
                                       : transition(features, folded.affine(), conv, nullptr, grid,
                                                    return_statistics ? &statistics : nullptr);
  return {features, mean, var, bottlenecks, out, out_mean, out_var};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> dense_block_and_reader_backward(
    const BlockAndReader& parts, const Tensor& grad, const Tensor& features, const Tensor& mean, const Tensor& var,
    const std::vector<Tensor>& bottlenecks, int64_t in_channels) {
  const int64_t rows = features.size(0), packed = mean.size(0);
  const Norm norm = reader(parts, features.size(1));
  const Folded folded = norm.fold(vector(mean, packed, "mean"), vector(var, packed, "var"));
  const Gradients gradients(parts.tensors);
  const Gradients read(parts.read_tensors);
  const Tensor &conv = parts.read_tensors[4], &grad_conv = read.all[4];
  const Tensor p = new_vector(mean, packed), q = new_vector(mean, packed);
  Tensor total, sums;
  std::tie(total, sums) = conv.numel() == 0 ? head_backward(grad, features, folded.affine())
                                            : transition_backward(grad, features, folded.affine(), conv, parts.grid,
                                                                  true, static_cast<float*>(grad_conv.data_ptr()));
  norm.collect(folded, floats_of(sums), read.all.data(), output(p, packed, "p"), output(q, packed, "q"));
  const Tensor grad_x = dense_block_backward(total, total, features, for_each_layer(bottlenecks, parts.saved, mean),
                                             mean, var, rows, parts.tensors, parts.eps, parts.grid, in_channels,
                                             std::nullopt, gradients.all, p, q, !norm.frozen(), parts.prepend);
  return {grad_x, gradients.trained, read.trained};
}

namespace {

// The features, the packed mean and variance, the bottlenecks that are `saved`; the reader's result and its mean and
// variance
using Results = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor>;

Results op(Tensor x, std::optional<Tensor> x_mean, std::optional<Tensor> x_var, std::vector<Tensor> present,
           Sizes places, std::vector<double> eps, Sizes grid, Sizes saved, bool prepend,
           std::vector<Tensor> read_tensors, double read_eps, bool return_statistics) {
  STD_TORCH_CHECK(eps.size() == 2 * saved.size(), "eps: expected one for each of two stages a layer");
  const BlockAndReader parts = {
      in_places(present, places, eps.size(), x), eps, grid, saved, prepend, read_tensors, read_eps};
  const Made made = dense_block_and_reader(parts, x, x_mean, x_var, return_statistics);
  Tensor out = made.out;
  if (read_tensors[4].numel() > 0) {
    Sizes halved = grid;
    for (size_t i = 1; i < halved.size(); ++i) halved[i] /= 2;
    out = image(out, halved);
  }
  return {image(made.features, grid), made.packed_mean, made.packed_var, made.bottlenecks, out, made.mean, made.var};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> op_backward(
    Tensor grad, Tensor features, Tensor mean, Tensor var, std::vector<Tensor> bottlenecks, int64_t in_channels,
    std::vector<Tensor> present, Sizes places, std::vector<double> eps, Sizes grid, Sizes saved, bool prepend,
    std::vector<Tensor> read_tensors, double read_eps) {
  const BlockAndReader parts = {
      in_places(present, places, eps.size(), mean), eps, grid, saved, prepend, read_tensors, read_eps};
  auto made = dense_block_and_reader_backward(parts, grad, features, mean, var, bottlenecks, in_channels);
  std::get<0>(made) = image(std::get<0>(made), grid);
  return made;
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_dense_block_and_reader", TORCH_BOX(&densenet_fast::op));
  m.impl("cpu_dense_block_and_reader_backward", TORCH_BOX(&densenet_fast::op_backward));
}
