// A network from its images to the means of its last features, in one call: the stem, dense blocks with a transition
// between each two, and the head. For small images the calls between these parts take longer than some of their
// kernels.
#include "parts.h"
#include "results.h"
#include "running_statistics.h"

namespace densenet_fast {
namespace {

using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// The weight [B, C, h, w] as the stem's convolution takes it, [B, h, w, C], and its gradient back in its own layout
struct Taps {
  const Tensor& weight;
  const int64_t made, channels, height, width;

  explicit Taps(const Tensor& weight)
      : weight(weight), made(weight.size(0)), channels(weight.size(1)), height(weight.size(2)), width(weight.size(3)) {}

  // Calls f with the places of a value in `weight` and among the taps
  template <typename F>
  void each(F f) const {
    const int64_t of_made = weight.stride(0), of_channel = weight.stride(1);
    const int64_t of_line = weight.stride(2), of_column = weight.stride(3);
    int64_t tap = 0;
    for (int64_t b = 0; b < made; ++b) {
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          for (int64_t c = 0; c < channels; ++c) {
            f(b * of_made + c * of_channel + y * of_line + x * of_column, tap++);
          }
        }
      }
    }
  }

  Tensor gathered() const {
    Tensor taps = new_floats(weight, {made, height, width, channels});
    const float* from = static_cast<const float*>(weight.data_ptr());
    float* to = floats_of(taps);
    each([&](int64_t place, int64_t tap) { to[tap] = from[place]; });
    return taps;
  }

  Tensor gradient(Tensor taps) const {
    Tensor made = empty_floats_like(weight);
    const float* from = floats_of(taps);
    float* to = floats_of(made);
    each([&](int64_t place, int64_t tap) { to[place] = from[tap]; });
    return made;
  }
};

// Whether the values of a tensor fill its memory
bool is_dense(const Tensor& t) {
  const int64_t dims = t.dim();
  int64_t filled = 1;  // values that stand side by side
  for (int64_t found = 0; found < dims; ++found) {
    for (int64_t d = 0; d < dims; ++d) {
      if (t.stride(d) != filled || t.size(d) == 1) continue;
      filled *= t.size(d);
      break;
    }
  }
  return filled == t.numel();
}

// The parts' tensors: the convolution's weight, then those of the stem's stage, and of each block and its reader
struct Parts {
  Tensor convolution;
  int64_t stride, padding;
  Tensors stem;
  double stem_eps;
  Sizes grid;  // (N, H, W) of the convolution's result
  std::vector<BlockAndReader> pairs;

  // `layers` has the number of layers of each block
  Parts(const Tensor& images, const Tensors& present, const Sizes& places, const std::vector<double>& eps,
        const Sizes& layers, const Sizes& saved, const Sizes& prepend, int64_t stride, int64_t padding)
      : convolution(present.at(0)), stride(stride), padding(padding) {
    const int64_t stages = 2 * std::accumulate(layers.begin(), layers.end(), int64_t{0}) + layers.size() + 1;
    STD_TORCH_CHECK(static_cast<int64_t>(eps.size()) == stages, "eps: expected ", stages, ", got ", eps.size());
    STD_TORCH_CHECK(
        static_cast<int64_t>(saved.size()) == (stages - 1 - std::ssize(layers)) / 2 && prepend.size() == layers.size(),
        "saved, prepend: expected one for each layer and for each block");
    STD_TORCH_CHECK(convolution.dim() == 4, "tensors: expected a convolution's weight [B, C, h, w] first");
    for (const Tensor& t : present) {
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && is_dense(t), "tensors: expected float32, without gaps");
    }
    const Tensors all = in_places({present.begin() + 1, present.end()}, places, stages, convolution);
    auto tensors = all.begin();
    auto own_eps = eps.begin();
    auto own_saved = saved.begin();
    const auto next = [&](int64_t count) {
      tensors += count * kStageTensors, own_eps += count;
      return Tensors(tensors - count * kStageTensors, tensors);
    };
    stem = next(1);
    stem_eps = own_eps[-1];
    grid = {images.size(0)};
    for (int64_t d = 2; d < 4; ++d) {
      const int64_t room = images.size(d) + 2 * padding - convolution.size(d);
      STD_TORCH_CHECK(room >= 0, "images: expected at least the kernel's size");
      grid.push_back(room / stride + 1);
    }
    Sizes own_grid = {grid[0], (grid[1] + 1) / 2, (grid[2] + 1) / 2};
    for (size_t i = 0; i < layers.size(); ++i) {
      BlockAndReader pair;
      const int64_t count = 2 * layers[i];
      pair.tensors = next(count);
      pair.eps = {own_eps - count, own_eps};
      pair.grid = own_grid;
      pair.saved = {own_saved, own_saved + layers[i]};
      pair.prepend = prepend[i] != 0;
      pair.read_tensors = next(1);
      pair.read_eps = own_eps[-1];
      own_saved += layers[i];
      own_grid = {own_grid[0], own_grid[1] / 2, own_grid[2] / 2};
      pairs.push_back(pair);
    }
  }

  // Whether block i normalises its input by the batch
  bool reads_statistics(size_t i) const {
    if (i == pairs.size()) return false;
    const Tensors& tensors = pairs[i].tensors;
    for (size_t stage = 0; stage < pairs[i].eps.size(); stage += 2) {
      if (tensors[stage * kStageTensors + 2].numel() == 0) return true;
    }
    return false;
  }

  // Channels of the input of block i, which makes so many columns of them
  int64_t in_channels(size_t i, int64_t columns) const {
    const Tensors& tensors = pairs[i].tensors;
    for (size_t stage = 1; stage < pairs[i].eps.size(); stage += 2) {
      columns -= tensors[stage * kStageTensors + 4].size(0);
    }
    return columns;
  }
};

// Whether all variances are at most `largest`, and numbers
bool within(const Tensor& var, double largest) {
  const float* v = vector(var, var.size(0), "var");
  return std::all_of(v, v + var.size(0), [&](float value) { return value <= largest; });
}

// The means [N, C], and what the backward pass reads: the convolution's map, the positions of its maxima, its mean and
// variance; and of each block the features, the packed mean and variance, and the bottlenecks that are `saved`.
// Neither, and nothing is updated, if a variance is not at most `largest`. Of the stem, and of each block with its
// reader, `tracked` says how many normalisations have running statistics.
std::tuple<Tensor, Tensors> network(Tensor images, Tensors present, Sizes places, std::vector<double> eps, Sizes layers,
                                    Sizes saved, Sizes prepend, int64_t stride, int64_t padding, Tensors vectors,
                                    Tensors counters, std::vector<double> momenta, Sizes starts, Sizes tracked,
                                    double largest) {
  const Parts parts(images, present, places, eps, layers, saved, prepend, stride, padding);
  const RunningStatistics running(vectors, counters, momenta, starts);
  STD_TORCH_CHECK(tracked.size() == layers.size() + 1 &&
                      std::accumulate(tracked.begin(), tracked.end(), size_t{0}) == momenta.size(),
                  "tracked: expected the number of momenta, in parts for the stem and for each block");
  const Tensor map = convolution(images, Taps(parts.convolution).gathered(), stride, padding);
  auto [x, argmax, mean, var, x_mean, x_var] =
      bn_relu_maxpool_stage(map, {}, {}, parts.stem, parts.stem_eps, parts.grid, parts.reads_statistics(0));
  struct Batch {
    Tensor mean, var;
    int64_t rows;
  };
  std::vector<Batch> batches = {{mean, var, map.size(0)}};
  Tensors kept = {map, argmax, mean, var};
  for (size_t i = 0; i < parts.pairs.size(); ++i) {
    const bool known = parts.reads_statistics(i);
    const int64_t rows = x.size(0);
    const Made made =
        dense_block_and_reader(parts.pairs[i], x, known ? std::optional(x_mean) : std::nullopt,
                               known ? std::optional(x_var) : std::nullopt, parts.reads_statistics(i + 1));
    x = made.out, x_mean = made.mean, x_var = made.var;
    batches.push_back({made.packed_mean, made.packed_var, rows});
    kept.insert(kept.end(), {made.features, made.packed_mean, made.packed_var});
    kept.insert(kept.end(), made.bottlenecks.begin(), made.bottlenecks.end());
  }
  if (!std::all_of(batches.begin(), batches.end(), [&](const Batch& b) { return within(b.var, largest); })) {
    return {nothing(images), {}};
  }
  const auto each = [&](auto f) {
    for (size_t i = 0, first = 0; i < batches.size(); first += tracked[i++]) f(batches[i], first, first + tracked[i]);
  };
  each([&](const Batch& b, size_t first, size_t end) { running.check(first, end, b.mean.size(0)); });
  each([&](const Batch& b, size_t first, size_t end) {
    running.update(first, end, vector(b.mean, b.mean.size(0), "mean"), vector(b.var, b.var.size(0), "var"), b.rows);
  });
  running.count_batch();
  return {x, kept};
}

// From the gradient of the means [N, C] and what the forward pass `kept`: the gradients of the convolution's weight and
// of the tensors of the stem, of each block and of its reader, of each that has one
Tensors network_backward(Tensor grad, Tensor images, Tensors kept, Tensors present, Sizes places,
                         std::vector<double> eps, Sizes layers, Sizes saved, Sizes prepend, int64_t stride,
                         int64_t padding) {
  const Parts parts(images, present, places, eps, layers, saved, prepend, stride, padding);
  const auto in_all = std::count(saved.begin(), saved.end(), 1);
  STD_TORCH_CHECK(std::ssize(kept) == 4 + 3 * std::ssize(layers) + in_all,
                  "kept: expected what the forward pass returned");
  std::vector<Tensors> gradients;  // of the last part first
  auto end = kept.end();
  for (size_t i = parts.pairs.size(); i-- > 0;) {
    const BlockAndReader& pair = parts.pairs[i];
    const auto bottlenecks = end - std::count(pair.saved.begin(), pair.saved.end(), 1);
    const Tensor &features = bottlenecks[-3], &mean = bottlenecks[-2], &var = bottlenecks[-1];
    auto [grad_x, own, read] = dense_block_and_reader_backward(pair, grad, features, mean, var, {bottlenecks, end},
                                                               parts.in_channels(i, features.size(1)));
    gradients.push_back(read);
    gradients.push_back(own);
    grad = grad_x;
    end = bottlenecks - 3;
  }
  auto [grad_map, own] =
      bn_relu_maxpool_stage_backward(grad, kept[1], kept[0], kept[2], kept[3], parts.stem, parts.stem_eps, parts.grid);
  gradients.push_back(own);
  const Taps taps(parts.convolution);
  gradients.push_back({taps.gradient(convolution_grad_weight(grad_map, images, taps.gathered(), stride, padding))});
  Tensors all;
  for (auto part = gradients.rbegin(); part != gradients.rend(); ++part) {
    all.insert(all.end(), part->begin(), part->end());
  }
  return all;
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_network", TORCH_BOX(&densenet_fast::network));
  m.impl("cpu_network_backward", TORCH_BOX(&densenet_fast::network_backward));
}
