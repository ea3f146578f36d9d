// A whole dense block in inference, normalised by running statistics: layer by layer
//
//   Z = relu(bn2(relu(bn1(F[:, :C])) @ W1^T));   F[:, C:C+k] = conv3x3(Z, W2)
//
// in two parallel regions a layer.
#include "bn_relu_conv1x1.h"
#include "bn_relu_conv3x3.h"
#include "inference.h"

namespace densenet_fast {
namespace {

// of two normalisations and, each behind one, the convolutions' weights
constexpr size_t kLayerTensors = 2 * (kNormTensors + 1);
constexpr int64_t kFewRows = 4096;  // divided into tiles of half the usual size: no thread waits long for the last

// What it costs to transform an output channel's filters, in tiles that are transformed
constexpr double kFilterCost = 1.5;

template <typename T>
struct Layer {
  const Tensor* tensors;
  double first_eps, second_eps;
  Weight<T> weight;
  Filters<T> filters;
  int64_t read, made;  // the first column that it reads, and the first that it makes

  Layer(const Tensor* tensors, const double* eps)
      : tensors(tensors), first_eps(eps[0]), second_eps(eps[1]), weight(tensors[4]), filters(tensors[9], weight.rows) {}

  int64_t width() const { return weight.cols; }
  int64_t bottleneck() const { return weight.rows; }
  int64_t growth() const { return filters.out_channels; }
  FrozenNorm first() const { return FrozenNorm(tensors, first_eps, width()); }
  FrozenNorm second() const { return FrozenNorm(tensors + kNormTensors + 1, second_eps, bottleneck()); }
};

// What a thread works in, from layer to layer
template <typename Tile, typename T>
struct Workspace {
  ProductScratch<T> product;
  Scratch<float> products;
  Panels filters;
  Transformed<Tile> transformed;
  Pixels<const T> around, next;
  Pixels<T> inside;
};

template <typename Tile, typename T>
class Block {
 public:
  Block(const Matrix<T>& features, std::vector<Layer<T>> layers, const std::vector<int64_t>& grid, const Tensor& like)
      : features_(features),
        layers_(std::move(layers)),
        image_(grid, features.rows, kWidest<Tile>),
        tile_rows_(features.rows > kFewRows ? kTileRows : kTileRows / 2),
        tile_columns_((features.rows > kFewRows ? kForwardPixels : kForwardPixels / 2) / (image_.pixels() * planes())) {
    STD_TORCH_CHECK(image_.dims == 2, "grid: expected two spatial sizes, got ", image_.dims);
    for (const Layer<T>& layer : layers_) {
      check_dimensions(layer.filters, image_);
      bottleneck_ = std::max(bottleneck_, layer.bottleneck());
      growth_ = std::max(growth_, layer.growth());
      width_ = std::max(width_, layer.width());
    }
    z_ = empty(like, {features.rows * bottleneck_});
    workspaces_.resize(std::max<int64_t>(torch::stable::get_num_threads(), 1));
  }

  void run() {
    for (const Layer<T>& layer : layers_) {
      const Matrix<T> z = {static_cast<T*>(z_.data_ptr()), features_.rows, layer.bottleneck(), layer.bottleneck()};
      conv1x1(layer, z);
      conv3x3(layer, z.readonly());
    }
  }

 private:
  Workspace<Tile, T>& workspace(int64_t share) {
    std::unique_ptr<Workspace<Tile, T>>& own = workspaces_[share];
    if (!own) {
      const int64_t rows = std::min(features_.rows, tile_rows_);
      const int64_t tiles = std::min(image_.columns(), std::max<int64_t>(tile_columns_, 1)) * planes();
      own.reset(new Workspace<Tile, T>{{rows, bottleneck_, width_, false},
                                       scratch<float>(image_.values() * tiles * round_up(growth_, 16)),
                                       {growth_, steps_of<Tile>(bottleneck_), image_.values() * image_.taps},
                                       {image_.values(), tiles, bottleneck_, false, true},
                                       Pixels<const T>(image_, true),
                                       Pixels<const T>(image_),
                                       Pixels<T>(image_)});
    }
    return *own;
  }

  void conv1x1(const Layer<T>& layer, const Matrix<T>& z) {
    const FrozenNorm first = layer.first(), second = layer.second();
    const Affine affine = first.affine(), then = second.affine();
    const Matrix<const T> x = features_.columns(layer.read, layer.width()).readonly();
    multiply_in_shares<T>(
        Shares(x.rows, tile_rows_, z.cols, kPackCost), layer.weight, nullptr, &then, z, false,
        [&](int64_t share) -> ProductScratch<T>& { return workspace(share).product; },
        [&](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<T> values, T*) {
          kernels_of<T>().bn_relu(x.from(row, c), rows, cols, affine.from(c), values);
        });
  }

  int64_t planes() const { return std::max<int64_t>(image_.depth, 1); }
  Part part(int64_t first, int64_t columns) const { return {first, columns, 0, planes(), columns, 0, 0}; }

  void conv3x3(const Layer<T>& layer, const Matrix<const T>& z) {
    const TileKernels<T>& kernel = tile_kernels<T>(image_);
    const int64_t depth = sum_depth<Tile>(image_);
    const Shares shares(image_.columns(), std::max<int64_t>(tile_columns_, 1), layer.growth(), kFilterCost);
    shares.run([&](int64_t share, int64_t column, auto each) {
      Workspace<Tile, T>& own = workspace(share);
      const Transformed<Tile>& v = own.transformed;
      Panels& weights = own.filters;
      weights.reshape(std::min(shares.columns, layer.growth() - column), steps_of<Tile>(z.cols));
      const Matrix<T> out = features_.columns(layer.made + column, weights.cols);
      const int64_t ld = weights.padded(), values = image_.values();
      bool packed = false;
      each([&](int64_t first, int64_t columns, int64_t following) {
        const Part now = part(first, columns);
        const int64_t n = now.rows();
        for (int64_t p = 0; !packed && p < weights.count; ++p) {
          for (const Step& step : image_.steps) {
            layer.filters.template transform_slice<Tile>(image_, weights, p, column + 32 * p, 0, z.cols, false,
                                                         step.tap);
          }
        }
        packed = true;
        transform_input(kernel, own.around.of(z, now), n, z.cols, nullptr, v);
        own.next.of(z, part(first + columns, following));
        const std::vector<Tap> taps = image_.taps_of(now);
        for (int64_t i = 0; i < values; ++i) {
          prefetch(own.next.pointers, i, values, 0, z.cols);
          for (int64_t p = 0; p < weights.count; ++p) {
            multiply_taps(v, taps, weights, p, values, i, depth, own.products.get() + i * n * ld + 32 * p, ld);
          }
        }
        kernel.output(own.products.get(), ld, n, out.cols, nullptr, own.inside.of(out, now));
      });
    });
  }

  Matrix<T> features_;
  std::vector<Layer<T>> layers_;
  ImageTiles image_;
  int64_t tile_rows_, tile_columns_;
  int64_t bottleneck_ = 0, growth_ = 0, width_ = 0;  // the largest
  Tensor z_;
  std::vector<std::unique_ptr<Workspace<Tile, T>>> workspaces_;
};

// Fills the columns of features but the first in_channels or, to prepend, the last, which are the block's input
void dense_block_inference(Tensor features, int64_t in_channels, std::vector<Tensor> tensors, std::vector<double> eps,
                           std::vector<int64_t> grid, bool prepend) {  // [M, C_total]
  by_dtype(features, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(!eps.empty() && eps.size() % 2 == 0 && 2 * tensors.size() == kLayerTensors * eps.size(),
                    "tensors: expected five for each of two stages a layer");
    const Matrix<T> f(features, "features");
    std::vector<Layer<T>> layers;
    int64_t columns = in_channels;
    for (size_t i = 0; 2 * i < eps.size(); ++i) {
      layers.emplace_back(&tensors[i * kLayerTensors], &eps[2 * i]);
      STD_TORCH_CHECK(layers.back().width() == columns, "weight: expected ", columns, " columns, got ",
                      layers.back().width());
      columns += layers.back().growth();
    }
    STD_TORCH_CHECK(f.cols == columns, "features: expected ", columns, " columns, got ", f.cols);
    for (Layer<T>& layer : layers) {
      layer.read = prepend ? columns - layer.width() : 0;
      layer.made = prepend ? layer.read - layer.growth() : layer.width();
    }
    if (kernels().multiplies_bf16) {
      Block<T, T>(f, std::move(layers), grid, features).run();
    } else {
      Block<float, T>(f, std::move(layers), grid, features).run();
    }
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_dense_block_inference", TORCH_BOX(&densenet_fast::dense_block_inference));
}
