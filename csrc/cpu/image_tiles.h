// The tiles that the convolution of kernel size 3 works on, and their division into parts that stay in cache.
//
// In two dimensions, and in each plane of three, a tile is 2x2 or 2x4 pixels, at the lower and right border perhaps
// fewer. The tiles of one place in all planes of a volume are a column. An image is a volume of one plane. Where pixels
// are tiles, as those of a line are, each is a plane of its own. A part is some columns between two planes: rows, plane
// by plane, of which the taps that lead to another plane read ranges.
//
// Example:
//
//   const Matrix<const float> m(x, "x");
//   const ImageTiles image({2, 20, 20}, m.rows, 4);        // two images of 20x20 pixels, in tiles of 2x4
//   const Parts parts(image, 112, 1);                      // of about 112 pixels
//   Pixels<const float> around(image, true);
//   const float* const* rows = around.input(m, parts[0]);  // 4x6 rows of m for each tile; null outside
#pragma once

#include <array>
#include <numeric>

#include "tiles.h"

namespace densenet_fast {

// From plane to plane along one of the filters' taps: how far in each dimension, and how many planes
struct Step {
  int64_t tap;
  std::array<int64_t, 3> along;
  int64_t planes;
};

// Of a part, rows `out`, ... of the result, to which a tap adds rows `in`, ... of its input; the tap's first or `more`
struct Tap {
  int64_t number, out, in, rows;
  bool more;
};

// Columns `first`, ... in planes `plane`, ...; `width` rows for each plane, of which those behind the last column stand
// for no tile
struct Part {
  int64_t first, columns, plane, planes, width;
  int64_t above, below;  // the planes that its input has more

  int64_t rows() const { return planes * width; }
  int64_t input_rows() const { return (above + planes + below) * width; }
};

struct ImageTiles {
  int64_t dims, batch, depth = 1, height = 1, width = 1, down, across;
  int64_t high = 2, wide = 2, border = 1;  // of a tile, and what its filters reach beyond it
  int64_t taps = 1, tile_taps = 1;         // from plane to plane, and those that each of them has within a tile
  std::vector<Step> steps;                 // of the taps that any pixel has, that within the plane first
  int64_t reach = 0;                       // the most planes of a step

  // Of fewer pixels the wider tiles' rounding would show
  static constexpr int64_t kManyPixels = 768;
  // Of so few, and so few in an image, the smaller tiles' would, and pixels as tiles take no longer
  static constexpr int64_t kFewPixels = 256, kFewInImage = 32;

  // Tiles of `widest` pixels across where that is faster, of one pixel where that is
  ImageTiles(const std::vector<int64_t>& grid, int64_t rows, int64_t widest) {
    dims = spatial_dims(grid, rows);
    batch = grid[0];
    std::copy(grid.begin() + 1, grid.end(), planes_.end() - dims);
    const auto [z, y, x] = planes_;  // of pixels, so far
    std::array<int64_t, 3> kernel = {dims > 2 ? 3 : 1, dims > 1 ? 3 : 1, 3};
    if (dims == 1 || pixels_suffice(rows)) {
      depth = z * y * x;
      high = wide = 1;
      border = 0;
    } else {
      depth = z;
      height = y;
      width = x;
      if (width > 2 && rows >= kManyPixels) wide = widest;
      tile_taps = kernel[1] * kernel[2];
      planes_ = {depth, 1, 1};
      kernel = {kernel[0], 1, 1};
    }
    down = (height + high - 1) / high;
    across = (width + wide - 1) / wide;
    find_steps(kernel);
  }

  bool of_pixels() const { return border == 0; }
  int64_t columns() const { return batch * down * across; }
  int64_t pixels() const { return high * wide; }                                // of a tile
  int64_t values() const { return (high + 2 * border) * (wide + 2 * border); }  // of a transformed tile

  // Pointers to the pixels, from `border` above and left to it below and right, of the tiles of a part's columns in
  // `planes` planes from `plane`; null outside
  template <typename T>
  void pixels(const Matrix<T>& m, const Part& part, int64_t plane, int64_t planes, int64_t border, T** out) const {
    const int64_t rows = high + 2 * border, cols = wide + 2 * border, count = rows * cols;
    const int64_t next_plane = height * width * m.ld, next = part.width * count;
    for (int64_t column = 0; column < part.width; ++column) {
      const int64_t t = part.first + column, volume = t / (down * across);
      const int64_t y = t / across % down * high - border, x = t % across * wide - border;
      T** to = out + column * count;
      for (int64_t i = y; i < y + rows; ++i) {
        for (int64_t j = x; j < x + cols; ++j) {
          const bool inside = column < part.columns && 0 <= i && i < height && 0 <= j && j < width;
          *to++ = inside ? m.row(((volume * depth + plane) * height + i) * width + j) : nullptr;
        }
      }
    }
    for (int64_t i = next; i < planes * next; ++i) out[i] = out[i - next] ? out[i - next] + next_plane : nullptr;
  }

  // In a part, in the order of the steps
  std::vector<Tap> taps_of(const Part& part) const {
    std::vector<Tap> found;
    for (const Step& step : steps) {
      const auto [first, end] = pixels_with(step);
      int64_t last = -1;  // behind the planes of the tap that were found last
      for (int64_t z = first[0]; z < end[0]; ++z) {
        for (int64_t y = first[1]; y < end[1]; ++y) {
          const int64_t line = (z * planes_[1] + y) * planes_[2];
          const int64_t from = std::max(line + first[2], part.plane);
          const int64_t to = std::min(line + end[2], part.plane + part.planes);
          if (from >= to) continue;
          if (from == last) {
            found.back().rows += (to - from) * part.width;
          } else {
            found.push_back({step.tap, (from - part.plane) * part.width,
                             (from + step.planes - part.plane + part.above) * part.width, (to - from) * part.width,
                             last >= 0});
          }
          last = to;
        }
      }
    }
    return found;
  }

 private:
  std::array<int64_t, 3> planes_ = {1, 1, 1};  // of a volume, in each dimension

  // Whether pixels as tiles are as fast as tiles of 2x2: of a plane they take no more products, or there are few
  bool pixels_suffice(int64_t rows) const {
    const auto [depth, height, width] = planes_;
    return (rows <= kFewPixels && depth * height * width <= kFewInImage) ||
           (3 * height - 2) * (3 * width - 2) <= 16 * ((height + 1) / 2) * ((width + 1) / 2);
  }

  // The first pixels, and behind the last, from which a step leads to others
  std::pair<std::array<int64_t, 3>, std::array<int64_t, 3>> pixels_with(const Step& step) const {
    std::array<int64_t, 3> first, end;
    for (int64_t dim = 0; dim < 3; ++dim) {
      first[dim] = std::max<int64_t>(-step.along[dim], 0);
      end[dim] = planes_[dim] - std::max<int64_t>(step.along[dim], 0);
    }
    return {first, end};
  }

  void find_steps(const std::array<int64_t, 3>& kernel) {
    taps = kernel[0] * kernel[1] * kernel[2];
    for (int64_t i = 0; i < taps; ++i) {
      const int64_t tap = (taps / 2 + i) % taps;
      Step step = {tap, {}, 0};
      bool leads = true;
      for (int64_t dim = 2, rest = tap, distance = 1; dim >= 0; --dim) {
        step.along[dim] = rest % kernel[dim] - kernel[dim] / 2;
        step.planes += step.along[dim] * distance;
        leads = leads && std::abs(step.along[dim]) < std::max<int64_t>(planes_[dim], 1);
        rest /= kernel[dim];
        distance *= planes_[dim];
      }
      if (!leads) continue;
      steps.push_back(step);
      reach = std::max(reach, std::abs(step.planes));
    }
  }
};

// The division of the tiles into parts of about `pixels` pixels, each of them a multiple of `multiple` a plane
struct Parts {
  const ImageTiles& image;
  int64_t multiple, columns, across, down;
  Tiles tiles;  // as many as parts

  // Neighbours' overlap is transformed once in their row, and once in planes
  static constexpr int64_t kColumns = 4;

  Parts(const ImageTiles& image, int64_t pixels, int64_t multiple)
      : image(image), multiple(image.taps > 1 ? multiple : 1), columns(image.columns()), tiles(0, 1, 1) {
    const int64_t depth = std::max<int64_t>(image.depth, 1), rows = pixels / image.pixels();
    int64_t wide = std::clamp<int64_t>(columns, 1, kColumns);
    const int64_t deep = std::clamp<int64_t>(rows / wide, 1, depth);
    if (deep == depth) wide = std::max<int64_t>(rows / deep, 1);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t chunks = std::clamp<int64_t>(threads, 1, std::max<int64_t>(columns * depth / 8, 1));
    down = (depth + deep - 1) / deep;
    across = std::max<int64_t>((columns + wide - 1) / wide, 1);
    across = std::clamp<int64_t>(round_up(across, chunks / std::gcd(chunks, down)), 1, std::max<int64_t>(columns, 1));
    down = std::min(round_up(down, chunks / std::gcd(chunks, across)), depth);
    tiles = Tiles(across * down, 1, 1);
  }

  Part operator[](int64_t i) const {
    const int64_t a = i / down, d = i % down;
    const int64_t first = columns * a / across, count = columns * (a + 1) / across - first;
    const int64_t plane = image.depth * d / down, end = image.depth * (d + 1) / down;
    return {first,
            count,
            plane,
            end - plane,
            round_up(count, multiple),
            std::min(image.reach, plane),
            std::min(image.reach, image.depth - end)};
  }

  int64_t largest() const { return round_up((columns + across - 1) / across, multiple) * deepest(); }
  int64_t largest_input() const { return largest() / std::max<int64_t>(deepest(), 1) * (deepest() + 2 * image.reach); }

 private:
  int64_t deepest() const { return (image.depth + down - 1) / down; }
};

// The pixels of the tiles of a part, or those around them too
template <typename T>
struct Pixels {
  const ImageTiles& image;
  int64_t border;
  std::vector<T*> pointers;

  explicit Pixels(const ImageTiles& image, bool around = false) : image(image), border(around ? image.border : 0) {}

  T* const* of(const Matrix<T>& m, const Part& part, int64_t above = 0, int64_t below = 0) {
    const int64_t planes = above + part.planes + below;
    pointers.resize((image.high + 2 * border) * (image.wide + 2 * border) * planes * part.width);
    image.pixels(m, part, part.plane - above, planes, border, pointers.data());
    return pointers.data();
  }

  // With the planes above and below
  T* const* input(const Matrix<T>& m, const Part& part) { return of(m, part, part.above, part.below); }
};

}  // namespace densenet_fast
