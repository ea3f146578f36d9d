// The tiles that the convolution of kernel size 3 works on, and their division into parts that stay in cache.
//
// In two dimensions, and in each plane of three, a tile is 2x2 or 2x4 pixels, at the lower and right border perhaps
// fewer. The tiles of one place in all planes of a volume are a column. An image is a volume of one plane. A line is a
// volume whose planes, and tiles, are a pixel each. A part is some columns between two planes: rows, plane by plane, of
// which the taps of a neighbouring plane read a range.
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

// Of a part, rows `out`, ... of the result, to which one of the filters' taps in depth adds rows `in`, ... of its input
struct Tap {
  int64_t plane, out, in, rows;
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
  int64_t taps = 1;                        // in depth
  int64_t high = 2, wide = 2, border = 1;  // of a tile, and what its filters reach beyond it

  // Of fewer pixels, the smaller tiles' filters are made sooner than the wider tiles save
  static constexpr int64_t kManyPixels = 256;

  // Tiles of `widest` pixels across where that is faster
  ImageTiles(const std::vector<int64_t>& grid, int64_t rows, int64_t widest) {
    dims = spatial_dims(grid, rows);
    batch = grid[0];
    if (dims != 2) {
      depth = grid[1];
      taps = 3;
    }
    if (dims == 1) {
      high = wide = 1;
      border = 0;
    } else {
      height = grid[dims - 1];
      width = grid[dims];
      if (width > 2 && rows >= kManyPixels) wide = widest;
    }
    down = (height + high - 1) / high;
    across = (width + wide - 1) / wide;
  }

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

  // Those in a part with a range of rows, the plane's own first
  struct Taps {
    std::array<Tap, 3> taps;
    int64_t count = 0;

    const Tap* begin() const { return taps.data(); }
    const Tap* end() const { return begin() + count; }
  };

  Taps taps_of(const Part& part) const {
    Taps found;
    const int64_t centre = taps / 2;
    for (const int64_t step : {0, -1, 1}) {
      if (std::abs(step) > centre) break;
      const int64_t first = std::max(part.plane, -step), end = std::min(part.plane + part.planes, depth - step);
      if (first >= end) continue;
      found.taps[found.count++] = {centre + step, (first - part.plane) * part.width,
                                   (first + step - part.plane + part.above) * part.width, (end - first) * part.width};
    }
    return found;
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
    const bool reaches = image.taps > 1;
    return {first,
            count,
            plane,
            end - plane,
            round_up(count, multiple),
            reaches && plane > 0,
            reaches && end < image.depth};
  }

  int64_t largest() const { return round_up((columns + across - 1) / across, multiple) * deepest(); }
  int64_t largest_input() const { return largest() / std::max<int64_t>(deepest(), 1) * (deepest() + image.taps - 1); }

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
