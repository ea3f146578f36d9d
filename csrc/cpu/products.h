// A normalised matrix times a weight, row tile by row tile, and the backward pass: shared by the convolutions of one
// pixel and the transitions, which differ in what they do to a tile before (or, backward, after) its product.
//
// Example:
//
//   const Matrix<const float> m(x, "x");    // [M, C]
//   const Matrix<float> result(out, "out");  // [M, B] = relu(y) @ weight^T
//   const Affine bn = affine(mean, scale, shift, m.cols);
//   multiply<float>(Weight<float>(weight), nullptr, nullptr, result, product_tiles(m.rows), nullptr, false,
//                   [&](int64_t row, int64_t rows, int64_t c, int64_t cols, Rows<float> a, float*) {
//                     kernels_of<float>().bn_relu(m.from(row, c), rows, cols, bn.from(c), a);
//                   });
#pragma once

#include "panels.h"
#include "statistics.h"

namespace densenet_fast {

constexpr int64_t kTileRows = 112;    // a multiple of the product's row blocks
constexpr int64_t kDepthSteps = 256;  // a panel of this depth stays in the first-level cache

inline Tiles product_tiles(int64_t rows) { return Tiles(rows, kTileRows, 16); }

// The division of a backward pass among threads: of its rows, into tiles of as many words for either type; or, where
// rows are few, of the columns of the weight: to add up what each thread makes of the whole weight's gradient would
// take longer than what every thread does then
struct BackwardShares {
  Tiles tiles;  // of the rows
  int64_t panels, groups;

  BackwardShares(int64_t rows, const Panels& weights, int64_t per_word)
      : BackwardShares(rows, weights.count, per_word, rows <= 2 * weights.cols) {}

  BackwardShares(int64_t rows, int64_t panels, int64_t per_word, bool by_columns)
      : tiles(rows, kTileRows * per_word, by_columns ? rows : 16),
        panels(panels),
        groups(by_columns ? std::clamp<int64_t>(torch::stable::get_num_threads(), 1, panels) : 1) {}

  int64_t first_panel(int64_t group) const { return panels * group / groups; }

  // f(share, chunk of tiles, first panel, end of the panels) in parallel
  template <typename F>
  void run(F f) const {
    torch::stable::parallel_for(0, groups * tiles.chunks, 1, [&](int64_t begin, int64_t end) {
      const Tiles::Release release;
      for (int64_t share = begin; share < end; ++share) {
        const int64_t group = share / tiles.chunks;
        f(share, share % tiles.chunks, first_panel(group), first_panel(group + 1));
      }
    });
  }
};

// A weight [B, C] or [B, C, 1, ...] with adjacent columns, of the matrices' dtype or float32, which is rounded as it is
// packed
template <typename T>
struct Weight {
  int64_t rows, cols, ld;
  const T* own = nullptr;
  const float* wide = nullptr;

  explicit Weight(const Tensor& t) : rows(t.size(0)), cols(t.size(1)), ld(t.stride(0)) {
    STD_TORCH_CHECK(t.numel() == rows * cols && (t.stride(1) == 1 || cols <= 1),
                    "weight: expected [B, C] or [B, C, 1, ...] with adjacent columns");
    if (t.scalar_type() == kDtype<T>) {
      own = static_cast<const T*>(t.data_ptr());
    } else {
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "weight: dtype unlike the others', and not float32");
      wide = static_cast<const float*>(t.data_ptr());
    }
  }

  Weight(const Tensor& t, int64_t columns) : Weight(t) {
    STD_TORCH_CHECK(cols == columns, "weight: expected ", columns, " columns, got ", cols);
  }

  // The panels whose columns are this one's rows, and the depth its columns; or, transposed, the other way round
  void pack(const Panels& panels, bool transposed) const {
    panels.each([&](int64_t p) { pack_panel(panels, p, 32 * p, transposed); });
  }

  // Panel p, whose first column is `column`
  void pack_panel(const Panels& panels, int64_t p, int64_t column, bool transposed) const {
    const int64_t valid = panels.valid(p), first = column * (transposed ? 1 : ld);
    const int64_t part_rows = transposed ? rows : valid, part_cols = transposed ? valid : cols;
    const T* part = own ? own + first : nullptr;
    int64_t part_ld = ld;
    const auto rounded = scratch<T>(own ? 0 : part_rows * part_cols);
    if (!own) {
      kernels_of<T>().store_rows({wide + first, ld}, part_rows, part_cols, nullptr, nullptr,
                                 {rounded.get(), part_cols});
      part = rounded.get();
      part_ld = part_cols;
    }
    kernels_of<T>().pack(part, transposed ? part_ld : 1, transposed ? 1 : part_ld, transposed ? rows : cols, valid,
                         panels.width(p), panels.panel(p));
  }
};

// What a thread multiplies a tile of `rows` rows in: as many as kDepthSteps of a's words at a time, what their rounding
// loses, and the products
template <typename T>
struct TileProduct {
  int64_t words;  // from row to row of a
  Scratch<T> a, rest;
  Scratch<float> sums;

  // with as many as `cols` columns, a multiple of 16; `rest` if `exact`
  TileProduct(int64_t rows, int64_t steps, int64_t cols, bool exact)
      : words(std::min(steps, kDepthSteps) + kSkew),
        a(scratch<T>(rows * words * kPerWord<T>)),
        rest(scratch<T>(exact ? rows * words * kPerWord<T> : 0)),
        sums(scratch<float>(rows * cols)) {}

  // sums [rows, weights.padded()] = a @ weights for `depth` columns of a, rows `first`, ...: normalise as in multiply
  template <typename Normalise>
  void multiply(const Panels& weights, int64_t depth, int64_t first, int64_t rows, bool exact, Normalise normalise) {
    const int64_t ld = words * kPerWord<T>;
    for (int64_t step = 0; step < weights.steps; step += kDepthSteps) {
      const int64_t steps = std::min(weights.steps - step, kDepthSteps), c = step * kPerWord<T>;
      const int64_t cols = std::min(depth - c, steps * kPerWord<T>);
      normalise(first, rows, c, cols, Rows<T>{a.get(), ld}, exact ? rest.get() : nullptr);
      for (int64_t r = 0; cols < steps * kPerWord<T> && r < rows; ++r) {
        a[r * ld + cols] = T{};
        if (exact) rest[r * ld + cols] = T{};
      }
      for (int64_t p = 0; p < weights.count; ++p) {
        const Operand panel = {weights.panel(p) + step * weights.width(p), 0, weights.width(p)};
        const auto add = [&](const T* left, bool accumulate) {
          kernels_of<T>().product({as_words(left), words, 1}, panel, rows, weights.width(p), steps, sums.get() + 32 * p,
                                  weights.padded(), accumulate);
        };
        add(a.get(), step > 0);
        if (exact) add(rest.get(), true);
      }
    }
  }
};

// out = a @ weight^T + bias [B] for weight [B, C], `then` normalised and rectified unless null, with the statistics of
// out unless null; normalise(row, rows, column, columns, values, rest) writes that part of a, and to `rest`, with the
// same ld, what its rounding loses, which is multiplied too: null unless `exact`
template <typename T, typename Normalise>
void multiply(const Weight<T>& weight, const float* bias, const Affine* then, const Matrix<T>& out, const Tiles& tiles,
              TileStatistics* statistics, bool exact, Normalise normalise) {
  const Panels weights(weight.rows, steps_of<T>(weight.cols));
  weight.pack(weights, false);
  tiles.share([&](auto each) {
    TileProduct<T> product(tiles.largest(), weights.steps, weights.padded(), exact);
    each([&](int64_t tile, int64_t first, int64_t n) {
      product.multiply(weights, weight.cols, first, n, exact, normalise);
      kernels_of<T>().store_rows({product.sums.get(), weights.padded()}, n, out.cols, bias, then, out.from(first));
      if (statistics) statistics->add<T>(tile, out.readonly().from(first), n);
    });
  });
}

// The gradient of a product as it is stored: complete, or to be completed by what reaches its x through batch
// statistics (1)
template <typename T>
struct ProductGradient {
  Matrix<const T> stored;
  std::optional<Finalise<T>> finalise;
};

// Sums the chunks' products [panels, rows, width] in their order: [rows, cols]
inline void from_panels(const std::vector<Accumulator>& parts, const Panels& panels, int64_t rows, float* sums) {
  panels.each([&](int64_t p) {
    const int64_t width = panels.width(p), valid = panels.valid(p);
    for (int64_t r = 0; r < rows; ++r) {
      float* out = sums + r * panels.cols + 32 * p;
      const int64_t from = 32 * p * rows + r * width;
      std::copy_n(parts[0].values.get() + from, valid, out);
      for (size_t i = 1; i < parts.size(); ++i) kernels().f32.add(parts[i].values.get() + from, valid, out);
    }
  });
}

// The gradient of weight, float32 [B, C], from that of the product, and the sums over the rows [2, C] of what mask
// makes of the gradient of a; each unless null. mask(row, rows, column, columns, grad of a or nothing, a as a panel or
// nothing, sums)
template <typename T, typename Mask>
void multiply_backward(const ProductGradient<T>& gradient, const Weight<T>& weight, float* grad_weight, float* sums,
                       Mask mask) {
  const Matrix<const T>& grad = gradient.stored;
  const Kernels<T>& kernel = kernels_of<T>();
  const int64_t depth = steps_of<T>(grad.cols);
  const Panels weights(weight.cols, depth);
  const bool need_a = sums != nullptr, need_weight = grad_weight != nullptr;
  const BackwardShares shares(grad.rows, weights, kPerWord<T>);
  const Tiles& tiles = shares.tiles;
  if (need_a && shares.groups == 1) weight.pack(weights, true);
  const bool direct = tiles.chunks == 1 && weights.padded() == weight.cols;  // into grad_weight
  std::vector<Accumulator> weight_parts(tiles.chunks);
  for (Accumulator& part : weight_parts) part.reset(need_weight && !direct ? grad.cols * weights.padded() : 0);
  std::vector<ColumnSums> sums_parts(shares.groups * tiles.chunks);
  shares.run([&](int64_t share, int64_t chunk, int64_t begin, int64_t end) {
    constexpr bool paired = kPerWord<T> > 1;
    const int64_t rows = tiles.largest(), row_steps = steps_of<T>(rows), ld = (depth + kSkew) * kPerWord<T>;
    const bool words = grad.cols % kPerWord<T> == 0 && grad.ld % kPerWord<T> == 0 &&
                       reinterpret_cast<uintptr_t>(grad.data) % sizeof(uint32_t) == 0;
    const bool copied = gradient.finalise || !words;
    const auto grad_a = scratch<float>(rows * 32);
    const auto a = scratch<uint32_t>(row_steps * 32);
    const auto complete = scratch<T>(copied ? rows * ld : 0);
    const auto by_column = scratch<uint32_t>(paired ? row_steps * grad.cols : 0);  // grad as pairs along its rows
    const TransposedFactor<T> factor(need_weight ? row_steps * grad.cols : 0);
    const int64_t first_column = 32 * begin;
    for (int64_t p = begin; need_a && shares.groups > 1 && p < end; ++p) weight.pack_panel(weights, p, 32 * p, true);
    sums_parts[share].reset(std::min(weight.cols, 32 * end) - first_column);
    bool started = false;
    for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
      const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
      if (n == 0) continue;
      const T* tile_grad = grad.row(first);
      int64_t tile_ld = grad.ld;
      if (copied) {
        if (gradient.finalise) {
          gradient.finalise->apply(grad, first, n, {complete.get(), ld});
        } else {
          for (int64_t r = 0; r < n; ++r) std::copy_n(grad.row(first + r), grad.cols, complete.get() + r * ld);
        }
        for (int64_t r = 0; paired && grad.cols % 2 && r < n; ++r) complete[r * ld + grad.cols] = T{};
        tile_grad = complete.get();
        tile_ld = ld;
      }
      const Operand left = {as_words(tile_grad), tile_ld / kPerWord<T>, 1};
      Operand transposed = {};
      if (need_weight) {
        if (paired) kernel.pack(tile_grad, tile_ld, 1, n, grad.cols, grad.cols, by_column.get());
        transposed =
            factor.of(paired ? by_column.get() : left.words, paired ? grad.cols : tile_ld, grad.cols, steps_of<T>(n));
      }
      sums_parts[share].add([&](GradientSums own) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t c = 32 * p, width = weights.width(p);
          if (need_a) kernel.product(left, weights.operand(p), n, width, depth, grad_a.get(), width, false);
          mask(first, n, c, weights.valid(p), Rows<const float>{need_a ? grad_a.get() : nullptr, width},
               PanelRows{need_weight ? a.get() : nullptr, width},
               GradientSums{own.d + c - first_column, own.dx + c - first_column});
          if (need_weight) {
            kernel.product(transposed, {a.get(), 0, width}, grad.cols, width, steps_of<T>(n),
                           direct ? grad_weight + c : weight_parts[chunk].values.get() + c * grad.cols,
                           direct ? weight.cols : width, started);
          }
        }
      });
      started = true;
    }
  });
  if (need_weight && grad.rows == 0) std::fill_n(grad_weight, grad.cols * weight.cols, 0.0f);
  if (need_weight && grad.rows > 0 && !direct) from_panels(weight_parts, weights, grad.cols, grad_weight);
  for (int64_t group = 0; need_a && group < shares.groups; ++group) {
    total(&sums_parts[group * tiles.chunks], tiles.chunks, sums + 32 * shares.first_panel(group), weight.cols);
  }
}

}  // namespace densenet_fast
