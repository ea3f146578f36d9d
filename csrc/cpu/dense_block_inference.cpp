// A whole dense block in inference, normalised by running statistics: layer by layer
//
//   Z = relu(bn2(relu(bn1(F[:, :C])) @ W1^T));   F[:, C:C+k] = conv3x3(Z, W2)
//
// in two parallel regions a layer. A thread that has no rows left packs what the next region multiplies by.
#include "bn_relu_conv1x1.h"
#include "bn_relu_conv3x3.h"
#include "inference.h"

namespace densenet_fast {
namespace {

// of two normalisations and, each behind one, the convolutions' weights
constexpr size_t kLayerTensors = 2 * (kNormTensors + 1);
constexpr int64_t kPackedChannels = 32, kPackedDepth = 256;  // in a piece of work

template <typename T>
struct Layer {
  const Tensor* tensors;
  double first_eps, second_eps;
  Weight<T> weight;
  Filters<T> filters;
  int64_t read, made;  // the first column that it reads, and the first that it makes

  Layer(const Tensor* tensors, const double* eps)
      : tensors(tensors), first_eps(eps[0]), second_eps(eps[1]), weight(tensors[4]), filters(tensors[9]) {
    STD_TORCH_CHECK(filters.in_channels == weight.rows, "weight: expected ", weight.rows, " input channels, got ",
                    filters.in_channels);
  }

  int64_t width() const { return weight.cols; }
  int64_t bottleneck() const { return weight.rows; }
  int64_t growth() const { return filters.out_channels; }
  FrozenNorm first() const { return FrozenNorm(tensors, first_eps, width()); }
  FrozenNorm second() const { return FrozenNorm(tensors + kNormTensors + 1, second_eps, bottleneck()); }
};

// The panels of a 1x1 convolution's weight, packed piece by piece
template <typename T>
struct PackedWeight {
  Weight<T> weight;
  Panels panels;
  int64_t parts;  // of the depth

  explicit PackedWeight(const Weight<T>& weight)
      : weight(weight),
        panels(weight.rows, steps_of<T>(weight.cols)),
        parts((weight.cols + kPackedDepth - 1) / kPackedDepth) {}

  int64_t pieces() const { return panels.count * parts; }

  void pack(int64_t piece) const {
    const int64_t p = piece / parts, first = piece % parts * kPackedDepth;
    const int64_t depth = std::min(weight.cols - first, kPackedDepth), valid = panels.valid(p);
    const int64_t offset = 32 * p * weight.ld + first;
    uint32_t* to = panels.panel(p) + first / kPerWord<T> * panels.width(p);
    if (weight.own) return kernels_of<T>().pack(weight.own + offset, 1, weight.ld, depth, valid, panels.width(p), to);
    const auto rounded = scratch<T>(valid * depth);
    kernels_of<T>().store_rows(weight.wide + offset, weight.ld, valid, depth, nullptr, nullptr, rounded.get(), depth);
    kernels_of<T>().pack(rounded.get(), 1, depth, depth, valid, panels.width(p), to);
  }
};

// What a thread works in, from layer to layer
template <typename Tile, typename T>
struct Workspace {
  std::unique_ptr<T[], decltype(&std::free)> a;
  std::unique_ptr<float[], decltype(&std::free)> product, products;
  Transformed<Tile> transformed;
  Pixels<const T> around, next;
  Pixels<T> inside;

  Workspace(int64_t rows, int64_t a_ld, int64_t product_ld, int64_t tiles, int64_t cols, int64_t products_ld)
      : a(scratch<T>(rows * a_ld)),
        product(scratch<float>(rows * product_ld)),
        products(scratch<float>(16 * tiles * products_ld)),
        transformed(tiles, cols, false),
        around(4, 1, tiles),
        next(2, 0, tiles),
        inside(2, 0, tiles) {}
};

template <typename Tile, typename T>
class Block {
 public:
  Block(const Matrix<T>& features, std::vector<Layer<T>> layers, const ImageTiles& image, const Tensor& like)
      : features_(features),
        layers_(std::move(layers)),
        image_(image),
        rows_(product_tiles(features.rows)),
        tiles_(image.count(), kForwardTiles, 8) {
    for (const Layer<T>& layer : layers_) {
      widest_ = std::max(widest_, layer.bottleneck());
      largest_growth_ = std::max(largest_growth_, layer.growth());
    }
    bottleneck_ = torch::stable::new_empty(like, {features.rows * widest_});
    workspaces_.resize(std::max(rows_.chunks, tiles_.chunks));
  }

  void run() {
    std::optional<PackedWeight<T>> weight(layers_[0].weight);
    torch::stable::parallel_for(0, weight->pieces(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) weight->pack(piece);
    });
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer<T>& layer = layers_[i];
      const Panels filters(layer.growth(), steps_of<Tile>(layer.bottleneck()), 16);
      const Matrix<T> z = {static_cast<T*>(bottleneck_.data_ptr()), features_.rows, layer.bottleneck(),
                           layer.bottleneck()};
      conv1x1(layer, *weight, z, filters);
      if (i + 1 < layers_.size()) {
        weight.emplace(layers_[i + 1].weight);
      } else {
        weight.reset();
      }
      conv3x3(layer, filters, z.readonly(), weight);
    }
  }

 private:
  Workspace<Tile, T>& workspace(int64_t chunk) {
    std::unique_ptr<Workspace<Tile, T>>& own = workspaces_[chunk];
    if (!own) {
      own = std::make_unique<Workspace<Tile, T>>(rows_.largest(), kALd, round_up(widest_, 16), tiles_.largest(),
                                                 widest_, round_up(largest_growth_, 16));
    }
    return *own;
  }

  void conv1x1(const Layer<T>& layer, const PackedWeight<T>& packed, const Matrix<T>& z, const Panels& filters) {
    const FrozenNorm first = layer.first(), second = layer.second();
    const Affine then = second.affine();
    const Matrix<const T> x = features_.columns(layer.read, layer.width()).readonly();
    const Panels& weights = packed.panels;
    const int64_t product_ld = weights.padded();
    Pieces next(layer.filters.pieces(filters, false));
    rows_.share_chunks([&](int64_t chunk, auto each) {
      Workspace<Tile, T>& own = workspace(chunk);
      T* a = own.a.get();
      each([&](int64_t, int64_t row, int64_t n) {
        for (int64_t step = 0; step < weights.steps; step += kDepthSteps) {
          const int64_t steps = std::min(weights.steps - step, kDepthSteps), c = step * kPerWord<T>;
          const int64_t cols = std::min(x.cols - c, steps * kPerWord<T>);
          kernels_of<T>().bn_relu(x.row(row) + c, x.ld, n, cols, first.affine().from(c), a, kALd);
          for (int64_t r = 0; cols < steps * kPerWord<T> && r < n; ++r) a[r * kALd + cols] = T{};
          for (int64_t p = 0; p < weights.count; ++p) {
            const int64_t width = weights.width(p);
            kernels_of<T>().product({as_words(a), kALd / kPerWord<T>, 1}, {weights.panel(p) + step * width, 0, width},
                                    n, width, steps, own.product.get() + 32 * p, product_ld, step > 0);
          }
        }
        kernels_of<T>().store_rows(own.product.get(), product_ld, n, z.cols, nullptr, &then, z.row(row), z.ld);
      });
      next.take([&](int64_t piece) { layer.filters.template transform_piece<Tile>(filters, false, piece); });
    });
  }

  void conv3x3(const Layer<T>& layer, const Panels& weights, const Matrix<const T>& z,
               const std::optional<PackedWeight<T>>& following) {
    const Matrix<T> out = features_.columns(layer.made, layer.growth());
    const int64_t ld = weights.padded();
    Pieces next(following ? following->pieces() : 0);
    tiles_.share_chunks([&](int64_t chunk, auto each) {
      Workspace<Tile, T>& own = workspace(chunk);
      const Transformed<Tile>& v = own.transformed;
      each([&](int64_t tile, int64_t first, int64_t n) {
        transform_input(own.around.of(image_, z, first, n), n, z.cols, nullptr, v);
        own.next.of(image_, z, first + n, tiles_.begin(std::min(tile + 2, tiles_.count())) - first - n);
        for (int64_t i = 0; i < 16; ++i) {
          prefetch(own.next.pointers, i, 16, 0, z.cols);
          for (int64_t p = 0; p < weights.count; ++p) {
            const int64_t width = weights.width(p);
            for (int64_t step = 0; step < weights.steps; step += kSumDepth) {
              kernels_of<Tile>().product({v.at(i) + step, v.words, 1}, {weights.panel(p, i) + step * width, 0, width},
                                         n, width, std::min(weights.steps - step, kSumDepth),
                                         own.products.get() + i * n * ld + 32 * p, ld, step > 0);
            }
          }
        }
        kernels_of<T>().winograd_output(own.products.get(), ld, n, out.cols, nullptr,
                                        own.inside.of(image_, out, first, n));
      });
      next.take([&](int64_t piece) { following->pack(piece); });
    });
  }

  static constexpr int64_t kALd = (kDepthSteps + kSkew) * kPerWord<T>;

  Matrix<T> features_;
  std::vector<Layer<T>> layers_;
  ImageTiles image_;
  Tiles rows_, tiles_;
  int64_t widest_ = 0, largest_growth_ = 0;
  Tensor bottleneck_;
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
    const ImageTiles image(grid, f.rows);
    if (kernels().multiplies_bf16) {
      Block<T, T>(f, std::move(layers), image, features).run();
    } else {
      Block<float, T>(f, std::move(layers), image, features).run();
    }
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_dense_block_inference", TORCH_BOX(&densenet_fast::dense_block_inference));
}
