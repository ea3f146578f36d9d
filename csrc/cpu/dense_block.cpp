// A whole dense block, forward and backward: the walk of densenet_fast/ops/dense_block.py, in its letters, for layers
// with a bottleneck, without biases or dropout, in one process. Between two kernels it computes a few short vectors,
// for which a call of torch's each would take longer than the kernels of a small layer.
#include "dense_block.h"

#include "bn_relu_conv1x1.h"
#include "bn_relu_conv3x3.h"
#include "stage.h"

namespace densenet_fast {
namespace {

struct Layer {
  Stage first, second;
  int64_t width, bottleneck, growth;  // reads `width` columns, makes `growth`
  int64_t read, made;                 // the first column that it reads, and the first that it makes
  int64_t packed;                     // where the statistics of its bottleneck stand, behind those of all columns
};

struct Block {
  std::vector<Layer> layers;
  int64_t columns, packed, widest = 0;
  int64_t own = 0;         // the first column of the block's input
  bool return_statistics;  // the statistics of all features have a reader behind the block

  // With `prepend` new features come before those that are read, else behind them
  Block(const std::vector<Tensor>& tensors, const std::vector<double>& eps, int64_t in_channels, bool return_statistics,
        bool prepend)
      : columns(in_channels), return_statistics(return_statistics) {
    STD_TORCH_CHECK(eps.size() % 2 == 0 && tensors.size() == kStageTensors * eps.size(),
                    "tensors: expected six for each of two stages a layer");
    for (size_t i = 0; i < eps.size(); i += 2) {
      const Tensor* first = &tensors[i * kStageTensors];
      const Tensor* second = first + kStageTensors;
      const int64_t bottleneck = first[4].size(0), growth = second[4].size(0);
      layers.push_back({Stage(first, eps[i], columns), Stage(second, eps[i + 1], bottleneck), columns, bottleneck,
                        growth, 0, columns, 0});
      columns += growth;
      widest = std::max(widest, bottleneck);
    }
    packed = columns;
    if (prepend) own = columns - in_channels;
    for (Layer& layer : layers) {
      if (prepend) {
        layer.read = columns - layer.width;
        layer.made = layer.read - layer.growth;
      }
      layer.packed = packed;
      packed += layer.bottleneck;
    }
  }

  // Columns that layers behind layer i make
  int64_t later(size_t i) const { return columns - layers[i].width - layers[i].growth; }
  int64_t first_later(size_t i) const { return own > 0 ? 0 : columns - later(i); }

  // Whether layer i or a later one, or a reader behind the block, normalises its input by the batch
  bool normalised_by_batch(size_t i) const {
    return return_statistics ||
           std::any_of(layers.begin() + i, layers.end(), [](const Layer& layer) { return !layer.first.frozen(); });
  }
};

// A matrix within a buffer that is at least as large
template <typename T>
Matrix<T> within(const Tensor& buffer, int64_t rows, int64_t cols) {
  return {static_cast<T*>(buffer.data_ptr()), rows, cols, cols};
}

// Each layer's bottleneck [M, B] where it is kept. Else, in the backward pass, in those columns of G that nobody needs
// any more, which later layers made; where these are too few, in a buffer that all layers share
template <typename T>
class Bottlenecks {
 public:
  // One for each layer, empty where it is not kept; or none at all. Without `g` in the forward pass.
  Bottlenecks(const std::vector<Tensor>& kept, const Block& block, const Tensor& like, int64_t rows,
              const Matrix<T>* g = nullptr)
      : kept_(kept), block_(block), rows_(rows), g_(g), shared_(empty(like, {rows * widest_shared()})) {}

  bool keeps(size_t i) const { return !kept_.empty() && kept_[i].numel() > 0; }

  Matrix<T> of(size_t i, int64_t cols) const {
    if (stands_in_g(i)) return g_->columns(block_.first_later(i), cols);
    if (!keeps(i)) return within<T>(shared_, rows_, cols);
    const Matrix<T> z(kept_[i], "bottlenecks");
    STD_TORCH_CHECK(z.rows == rows_ && z.cols == cols, "bottlenecks: expected [M, B]");
    return z;
  }

 private:
  bool stands_in_g(size_t i) const { return !keeps(i) && g_ && block_.later(i) >= block_.layers[i].bottleneck; }

  int64_t widest_shared() const {
    STD_TORCH_CHECK(kept_.empty() || kept_.size() == block_.layers.size(),
                    "bottlenecks: expected none or one for each layer, got ", kept_.size());
    int64_t widest = 0;
    for (size_t i = 0; i < block_.layers.size(); ++i) {
      if (!keeps(i) && !stands_in_g(i)) widest = std::max(widest, block_.layers[i].bottleneck);
    }
    return widest;
  }

  const std::vector<Tensor>& kept_;
  const Block& block_;
  int64_t rows_;
  const Matrix<T>* g_;
  Tensor shared_;
};

// x into out, with its statistics, which are copied if they are given
template <typename T>
void take_input(const Matrix<const T>& x, const std::optional<Tensor>& x_mean, const std::optional<Tensor>& x_var,
                bool return_statistics, const Matrix<T>& out, const StatisticsOutput& statistics) {
  STD_TORCH_CHECK(x.rows == out.rows && x.cols == out.cols, "x: expected [", out.rows, ", ", out.cols, "]");
  STD_TORCH_CHECK(x_mean.has_value() == x_var.has_value(), "x_mean: expected with x_var");
  Tiles(x.rows, x.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
    for (int64_t row = first; row < first + n; ++row) std::copy_n(x.row(row), x.cols, out.row(row));
  });
  if (!return_statistics) return;
  if (!x_mean) return column_statistics(x, statistics);
  std::copy_n(vector(*x_mean, x.cols, "x_mean"), x.cols, statistics.mean);
  std::copy_n(vector(*x_var, x.cols, "x_var"), x.cols, statistics.var);
}

}  // namespace

void dense_block(Tensor features, int64_t in_channels, std::vector<Tensor> tensors, std::vector<double> eps,
                 std::vector<int64_t> grid, std::vector<Tensor> bottlenecks, Tensor mean, Tensor var,
                 bool return_statistics, bool prepend, std::optional<Tensor> x, std::optional<Tensor> x_mean,
                 std::optional<Tensor> x_var) {
  by_dtype(features, [&](auto zero) {
    using T = decltype(zero);
    const Block block(tensors, eps, in_channels, return_statistics, prepend);
    const Matrix<T> f(features, "features");
    STD_TORCH_CHECK(f.cols == block.columns, "features: expected ", block.columns, " columns, got ", f.cols);
    float *m = output(mean, block.packed, "mean"), *v = output(var, block.packed, "var");
    std::vector<float> rstd(block.packed);
    const Bottlenecks<T> kept(bottlenecks, block, features, f.rows);
    const auto statistics_of = [&](int64_t first, float eps) {
      return StatisticsOutput(m + first, v + first, rstd.data() + first, eps);
    };
    if (x) {
      advise_huge_pages(f);
      take_input<T>({*x, "x"}, x_mean, x_var, block.normalised_by_batch(0), f.columns(block.own, in_channels),
                    statistics_of(block.own, 0));
    }
    for (size_t i = 0; i < block.layers.size(); ++i) {
      const Layer& layer = block.layers[i];
      const Matrix<T> z = kept.of(i, layer.bottleneck);
      const Matrix<const T> inputs = f.columns(layer.read, layer.width).readonly();
      const Matrix<T> made = f.columns(layer.made, layer.growth);
      const Weight<T> weight(layer.first.conv);
      const Filters<T> filters(layer.second.conv);
      const Folded first = layer.first.fold(m + layer.read, v + layer.read);
      if (layer.second.frozen() && !kept.keeps(i)) {
        const Folded second = layer.second.fold(nullptr, nullptr);
        const Affine then = second.affine();
        conv1x1<T>(inputs, first.affine(), weight, nullptr, &then, z, nullptr);
        conv3x3<T>(z.readonly(), nullptr, filters, nullptr, grid, made);
      } else {
        const StatisticsOutput statistics = statistics_of(layer.packed, layer.second.eps);
        conv1x1<T>(inputs, first.affine(), weight, nullptr, nullptr, z, layer.second.frozen() ? nullptr : &statistics);
        const Folded second = layer.second.fold(m + layer.packed, v + layer.packed);
        const Affine affine = second.affine();
        conv3x3<T>(z.readonly(), &affine, filters, nullptr, grid, made);
      }
      if (block.normalised_by_batch(i + 1)) column_statistics<T>(made.readonly(), statistics_of(layer.made, 0));
    }
  });
}

Tensor dense_block_backward(Tensor grad, Tensor total, Tensor features, std::vector<Tensor> bottlenecks, Tensor mean,
                            Tensor var, double count, std::vector<Tensor> tensors, std::vector<double> eps,
                            std::vector<int64_t> grid, int64_t in_channels, std::optional<Tensor> grad_x,
                            std::vector<Tensor> gradients, Tensor p_packed, Tensor q_packed, bool return_statistics,
                            bool prepend) {
  return by_dtype(features, [&](auto zero) {
    using T = decltype(zero);
    const Block block(tensors, eps, in_channels, return_statistics, prepend);
    const Matrix<const T> f(features, "features"), incoming(grad, "grad");
    STD_TORCH_CHECK(f.cols == block.columns && incoming.cols == f.cols && incoming.rows == f.rows,
                    "features, grad: expected [M, C_total] each");
    STD_TORCH_CHECK(gradients.size() == tensors.size(), "gradients: expected as many as tensors");
    const float *m = vector(mean, block.packed, "mean"), *v = vector(var, block.packed, "var");
    float *p = output(p_packed, block.packed, "p"), *q = output(q_packed, block.packed, "q");
    std::optional<Tensor> scaled = empty(features, {f.rows * block.widest});
    const Matrix<T> g(total, "total");
    STD_TORCH_CHECK(g.rows == f.rows && g.cols == f.cols, "total: expected [M, C_total]");
    const Bottlenecks<T> kept(bottlenecks, block, features, f.rows, &g);
    Matrix<const T> source =
        incoming;  // where the gradient of F stands: the incoming one until the last layer has written G
    for (size_t i = block.layers.size(); i-- > 0;) {
      const Layer& layer = block.layers[i];
      const int64_t packed = layer.packed, read = layer.read;
      const Tensor *of_first = &gradients[2 * i * kStageTensors], *of_second = of_first + kStageTensors;
      const Folded first = layer.first.fold(m + read, v + read);
      const Folded second = layer.second.fold(m + packed, v + packed);
      const Matrix<const T> inputs = f.columns(read, layer.width);
      const Weight<T> weight(layer.first.conv);

      Matrix<const T> dy = source.columns(layer.made, layer.growth);
      if (block.normalised_by_batch(i + 1)) {
        const int64_t c = layer.made;
        const Matrix<T> target = g.columns(c, layer.growth);
        Finalise<T>(f.columns(c, layer.growth), m + c, p + c, q + c, count).apply(dy, target);
        dy = target.readonly();
      }

      const Matrix<T> z = kept.of(i, layer.bottleneck);
      if (!kept.keeps(i)) conv1x1<T>(inputs, first.affine(), weight, nullptr, nullptr, z, nullptr);
      const Matrix<T> dz = within<T>(*scaled, f.rows, layer.bottleneck);
      std::vector<float> sums(2 * layer.bottleneck);
      const FiltersGradient grad_filters(of_second[4]);
      STD_TORCH_CHECK(of_second[4].size(0) == layer.growth && of_second[4].size(1) == layer.bottleneck,
                      "gradients: expected the shapes of tensors");
      conv3x3_backward<T>(dy, z.readonly(), second.affine(), Filters<T>(layer.second.conv), grid,
                          {nullptr, &dz, sums.data()}, &grad_filters);
      layer.second.collect(second, sums.data(), of_second, p + packed, q + packed);

      ProductGradient<T> gradient = {dz.readonly(), {}};
      if (!layer.second.frozen()) {
        gradient.finalise.emplace(z.readonly(), m + packed, p + packed, q + packed, count);
      }
      sums.resize(2 * layer.width);
      const Matrix<const T> before = source.columns(read, layer.width);
      const Matrix<T> after = g.columns(read, layer.width);
      const Tensor& grad_weight = of_first[4];
      STD_TORCH_CHECK(grad_weight.numel() == layer.bottleneck * layer.width && grad_weight.is_contiguous() &&
                          grad_weight.scalar_type() == ScalarType::Float,
                      "gradients: expected [B, C, 1, 1], contiguous float32");
      conv1x1_backward<T>(gradient, inputs, first.affine(), weight, {&before, &after, sums.data()},
                          static_cast<float*>(grad_weight.data_ptr()));
      layer.first.collect(first, sums.data(), of_first, p + read, q + read);
      source = g.readonly();
    }
    scaled.reset();
    if (!grad_x) grad_x = empty(features, {f.rows, in_channels});
    const Matrix<T> result(*grad_x, "grad_x");
    STD_TORCH_CHECK(result.rows == f.rows && result.cols == in_channels, "grad_x: expected [M, C0]");
    const int64_t own = block.own;
    const Matrix<const T> rest = source.columns(own, in_channels);
    if (block.normalised_by_batch(0)) {
      Finalise<T>(f.columns(own, in_channels), m + own, p + own, q + own, count).apply(rest, result);
    } else {
      for (int64_t row = 0; row < rest.rows; ++row) std::copy_n(rest.row(row), rest.cols, result.row(row));
    }
    return *grad_x;
  });
}

namespace {

void op_backward(Tensor grad, Tensor total, Tensor features, std::vector<Tensor> bottlenecks, Tensor mean, Tensor var,
                 double count, std::vector<Tensor> tensors, std::vector<double> eps, std::vector<int64_t> grid,
                 Tensor grad_x, std::vector<Tensor> gradients, Tensor p, Tensor q, bool return_statistics,
                 bool prepend) {
  dense_block_backward(grad, total, features, bottlenecks, mean, var, count, tensors, eps, grid, grad_x.size(1), grad_x,
                       gradients, p, q, return_statistics, prepend);
}

}  // namespace

}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_dense_block", TORCH_BOX(&densenet_fast::dense_block));
  m.impl("cpu_dense_block_backward", TORCH_BOX(&densenet_fast::op_backward));
}
