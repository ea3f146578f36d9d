// Small products: with few rows, no two threads prepare the same columns of the right factor.
//
// Example:
//
//   const Shares shares(49, kTileRows, 128, kPackCost);  // a product [49, 128]: 49 rows, few
//   shares.run([&](int64_t share, int64_t column, auto each) {
//     // here a thread prepares its columns, shares.columns of them from `column` on
//     each([&](int64_t first, int64_t rows, int64_t) { /* and here it multiplies rows with them */ });
//   });
#pragma once

#include "products.h"

namespace densenet_fast {

// What it costs to pack a weight's row, in rows of values that are normalised
constexpr double kPackCost = 3;

// The division of a product among threads: its rows into chunks, and its columns into groups, so that with few rows no
// two threads prepare the same columns of the right factor, and with many none the same rows of the left one. A thread
// prepares for itself what it multiplies: from another core's cache it would come late.
struct Shares {
  Tiles tiles;              // of the rows, their chunks among the threads of a group
  int64_t groups, columns;  // of a group, a multiple of 16

  // tiles of about `tile` rows; to prepare a column costs as much as `cost` rows
  Shares(int64_t rows, int64_t tile, int64_t cols, double cost) : tiles(rows, tile, 8) {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1), widest = round_up(cols, 16) / 16;
    const double ideal = std::sqrt(cols * cost * threads / rows);
    groups = 1;
    for (int64_t g = 2; g <= std::min(threads, widest) && g <= ideal + 0.5; ++g) {
      if (threads % g == 0) groups = g;
    }
    columns = round_up((widest + groups - 1) / groups, cols > 16 * groups ? 2 : 1) * 16;
    groups = (round_up(cols, 16) + columns - 1) / columns;
    const int64_t chunks = std::clamp<int64_t>(threads / groups, 1, std::max<int64_t>(rows / 8, 1));
    tiles.chunks = chunks;
    tiles.per_chunk = std::max<int64_t>((rows + tile * chunks - 1) / (tile * chunks), 1);
  }

  int64_t count() const { return groups * tiles.chunks; }

  // f(share, first column, each) in parallel, where each(g) calls g(first row, rows, rows of the tile behind) for tiles
  // that nobody else of the group has
  template <typename F>
  void run(F f) const {
    std::vector<Remaining> remaining(count());
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t chunk = i % tiles.chunks;
      remaining[i].reset(chunk * tiles.per_chunk, (chunk + 1) * tiles.per_chunk);
    }
    torch::stable::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      const Tiles::Release release;
      for (int64_t share = begin; share < end; ++share) {
        const int64_t group = share / tiles.chunks, chunk = share % tiles.chunks;
        f(share, group * columns, [&](auto g) {
          for (int64_t i = 0; i < tiles.chunks; ++i) {
            Remaining& left = remaining[group * tiles.chunks + (chunk + i) % tiles.chunks];
            for (int64_t tile; (tile = i == 0 ? left.first() : left.last()) >= 0;) {
              const int64_t first = tiles.begin(tile), end = tiles.begin(tile + 1);
              if (end > first) g(first, end - first, tiles.begin(std::min(tile + 2, tiles.count())) - end);
            }
          }
        });
      }
    });
  }
};

// What a share of a product with a weight works in, for weights of at most `rows` by `cols`
template <typename T>
struct ProductScratch {
  TileProduct<T> product;
  Panels weights;

  ProductScratch(int64_t tile, int64_t rows, int64_t cols, bool exact)
      : product(tile, steps_of<T>(cols), round_up(rows, 16), exact), weights(rows, steps_of<T>(cols)) {}
};

// out = a @ weight^T + bias [B] for weight [B, C], without the bias if that is null, `then` normalised and rectified
// unless null; scratch_of(share) is the scratch of a share. Else as multiply.
template <typename T, typename ScratchOf, typename Normalise>
void multiply_in_shares(const Shares& shares, const Weight<T>& weight, const float* bias, const Affine* then,
                        const Matrix<T>& out, bool exact, ScratchOf scratch_of, Normalise normalise) {
  shares.run([&](int64_t share, int64_t column, auto each) {
    ProductScratch<T>& own = scratch_of(share);
    Panels& weights = own.weights;
    weights.reshape(std::min(shares.columns, weight.rows - column), steps_of<T>(weight.cols));
    const Affine behind = then ? then->from(column) : Affine{};
    bool packed = false;
    each([&](int64_t row, int64_t n, int64_t) {
      for (int64_t p = 0; !packed && p < weights.count; ++p) weight.pack_panel(weights, p, column + 32 * p, false);
      packed = true;
      own.product.multiply(weights, weight.cols, row, n, exact, normalise);
      kernels_of<T>().store_rows({own.product.sums.get(), weights.padded()}, n, weights.cols,
                                 bias ? bias + column : nullptr, then ? &behind : nullptr, out.from(row, column));
    });
  });
}

// multiply, with the statistics of out where they are to go, divided as suits the number of rows; `window` rows are
// normalised for each
template <typename T, typename Normalise>
void multiply_described(const Weight<T>& weight, const float* bias, const Affine* then, const Matrix<T>& out,
                        const StatisticsOutput* statistics, bool exact, int64_t window, Normalise normalise) {
  const Shares shares(out.rows, kTileRows, weight.rows, kPackCost / window);
  if (shares.groups > 1) {
    const int64_t tile = std::min(out.rows, kTileRows);
    std::vector<std::optional<ProductScratch<T>>> own(shares.count());
    multiply_in_shares<T>(
        shares, weight, bias, then, out, exact,
        [&](int64_t share) -> ProductScratch<T>& { return own[share].emplace(tile, weight.rows, weight.cols, exact); },
        normalise);
    if (statistics) column_statistics<T>(out.readonly(), *statistics);
    return;
  }
  const Tiles tiles = product_tiles(out.rows);
  TileStatistics partial(tiles, statistics ? weight.rows : 0);
  multiply<T>(weight, bias, then, out, tiles, statistics ? &partial : nullptr, exact, normalise);
  if (statistics) partial.combine(tiles, *statistics);
}

}  // namespace densenet_fast
