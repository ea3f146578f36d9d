// A normalised matrix times a weight, row tile by row tile, and the backward pass: shared by the convolutions of one
// pixel and the transitions, which differ in what they do to a tile before (or, backward, after) its product.
#pragma once

#include "tiles.h"

namespace densenet_fast {

constexpr int64_t kTileRows = 112;    // a multiple of the product's row blocks
constexpr int64_t kDepthSteps = 256;  // a panel of this depth stays in the first-level cache

inline Tiles product_tiles(int64_t rows) { return Tiles(rows, kTileRows, 16); }

// Backward, the rows are summed over too: as many words of them for either type
template <typename T>
Tiles backward_tiles(int64_t rows) {
  return Tiles(rows, kTileRows * kPerWord<T>, 16);
}

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
      kernels_of<T>().store_rows(wide + first, ld, part_rows, part_cols, nullptr, nullptr, rounded.get(), part_cols);
      part = rounded.get();
      part_ld = part_cols;
    }
    kernels_of<T>().pack(part, transposed ? part_ld : 1, transposed ? 1 : part_ld, transposed ? rows : cols, valid,
                         panels.width(p), panels.panel(p));
  }
};

// out = a @ weight^T + bias for weight [B, C], `then` normalised and rectified unless null, with the statistics of out
// unless null; normalise(row, rows, column, columns, values, rest, ld) writes that part of a, and to `rest` what its
// rounding loses, which is multiplied too: null unless `exact`
template <typename T, typename Normalise>
void multiply(const Weight<T>& weight, const float* bias, const Affine* then, const Matrix<T>& out, const Tiles& tiles,
              TileStatistics* statistics, bool exact, Normalise normalise) {
  const Kernels<T>& kernel = kernels_of<T>();
  const Panels weights(weight.rows, steps_of<T>(weight.cols));
  weight.pack(weights, false);
  tiles.share([&](auto each) {
    const int64_t a_words = std::min(weights.steps, kDepthSteps) + kSkew, a_ld = a_words * kPerWord<T>;
    const int64_t product_ld = weights.padded();
    const auto a = scratch<T>(tiles.largest() * a_ld), rest = scratch<T>(exact ? tiles.largest() * a_ld : 0);
    const auto product = scratch<float>(tiles.largest() * product_ld);
    each([&](int64_t tile, int64_t first, int64_t n) {
      for (int64_t step = 0; step < weights.steps; step += kDepthSteps) {
        const int64_t steps = std::min(weights.steps - step, kDepthSteps), c = step * kPerWord<T>;
        const int64_t cols = std::min(weight.cols - c, steps * kPerWord<T>);
        normalise(first, n, c, cols, a.get(), exact ? rest.get() : nullptr, a_ld);
        for (int64_t r = 0; cols < steps * kPerWord<T> && r < n; ++r) {
          a[r * a_ld + cols] = T{};
          if (exact) rest[r * a_ld + cols] = T{};
        }
        for (int64_t p = 0; p < weights.count; ++p) {
          const Operand panel = {weights.panel(p) + step * weights.width(p), 0, weights.width(p)};
          kernel.product({as_words(a.get()), a_words, 1}, panel, n, weights.width(p), steps, product.get() + 32 * p,
                         product_ld, step > 0);
          if (exact) {
            kernel.product({as_words(rest.get()), a_words, 1}, panel, n, weights.width(p), steps,
                           product.get() + 32 * p, product_ld, true);
          }
        }
      }
      kernel.store_rows(product.get(), product_ld, n, out.cols, bias, then, out.row(first), out.ld);
      if (statistics) statistics->add(tile, out.row(first), out.ld, n);
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

// The gradient of weight, float32 [B, C], from that of the product, and the sums over the rows [2, C] of what mask
// makes of the gradient of a; each unless null. mask(row, rows, column, columns, grad of a or null, a as a panel or
// null, width of both, sum_d, sum_dx)
template <typename T, typename Mask>
void multiply_backward(const ProductGradient<T>& gradient, const Weight<T>& weight, float* grad_weight, float* sums,
                       Mask mask) {
  const Matrix<const T>& grad = gradient.stored;
  const Kernels<T>& kernel = kernels_of<T>();
  const int64_t depth = steps_of<T>(grad.cols);
  const Panels weights(weight.cols, depth);
  const bool need_a = sums != nullptr, need_weight = grad_weight != nullptr;
  if (need_a) weight.pack(weights, true);
  const Tiles tiles = backward_tiles<T>(grad.rows);
  std::vector<Accumulator> weight_parts(tiles.chunks);
  std::vector<ColumnSums> sums_parts(tiles.chunks);
  tiles.run([&](int64_t chunk) {
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
    Accumulator& weight_part = weight_parts[chunk];
    if (need_weight) weight_part.reset(grad.cols * weights.padded());
    sums_parts[chunk].reset(weight.cols);
    for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
      const int64_t first = tiles.begin(tile), n = tiles.begin(tile + 1) - first;
      if (n == 0) continue;
      const T* tile_grad = grad.row(first);
      int64_t tile_ld = grad.ld;
      if (copied) {
        if (gradient.finalise) {
          gradient.finalise->apply(grad, first, n, complete.get(), ld);
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
      sums_parts[chunk].add([&](float* sum_d, float* sum_dx) {
        for (int64_t p = 0; p < weights.count; ++p) {
          const int64_t c = 32 * p, width = weights.width(p);
          if (need_a) kernel.product(left, weights.operand(p), n, width, depth, grad_a.get(), width, false);
          mask(first, n, c, weights.valid(p), need_a ? grad_a.get() : nullptr, need_weight ? a.get() : nullptr, width,
               sum_d + c, sum_dx + c);
          if (need_weight) {
            kernel.product(transposed, {a.get(), 0, width}, grad.cols, width, steps_of<T>(n),
                           weight_part.values.get() + c * grad.cols, width, weight_part.started);
          }
        }
      });
      weight_part.started = true;
    }
    if (need_weight) weight_part.finish();
  });
  if (need_weight) from_panels(weight_parts, weights, grad.cols, grad_weight);
  if (need_a) total(sums_parts, sums);
}

}  // namespace densenet_fast
