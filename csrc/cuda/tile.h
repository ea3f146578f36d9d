// The tiles that a batch of images is divided into for 3x3 windows: their pixels, and the pixels that their windows
// hold.
#pragma once

#include "columns.h"

namespace densenet_fast::cuda {

constexpr int kImageColumns = 16;  // of a tile in a wide image

// The bit of a neighbour's tap, dy * 3 + dx + 4, is set if it is in the image
__device__ inline unsigned taps_inside(int y, int x, int height, int width) {
  const unsigned rows = (y > 0 ? 0x7 : 0) | 0x38 | (y + 1 < height ? 0x1C0 : 0);
  const unsigned columns = (x > 0 ? 0x49 : 0) | 0x92 | (x + 1 < width ? 0x124 : 0);
  return rows & columns;
}

// The slots from a pixel to its neighbour of a tap
__device__ inline int slots_to(int tap, int pitch) { return (tap / 3 - 1) * pitch + tap % 3 - 1; }

// A tile's pixels, numbered from 0, and the slots of its windows; rows of matrices, or -1 outside of the images
struct Tile {
  const Pixels& t;
  int64_t start;  // the first pixel; where a tile is of one image, the image's
  int top, left;  // where it starts in its image

  __device__ Tile(const Pixels& pixels, int64_t tile) : t(pixels), top(0), left(0) {
    if (t.across == 0) {
      start = tile * t.tile;
      return;
    }
    int64_t in_image, column;
    const int64_t image = divide(tile, static_cast<int64_t>(t.across) * t.down, in_image);
    top = static_cast<int>(divide(in_image, t.across, column)) * (t.tile / kImageColumns);
    left = static_cast<int>(column) * kImageColumns;
    start = image * t.height * t.width;
  }

  __device__ int64_t in_image(int y, int x) const {
    return 0 <= y && y < t.height && 0 <= x && x < t.width ? start + static_cast<int64_t>(y) * t.width + x : -1;
  }
  __device__ int64_t row(int i) const {
    if (t.across == 0) return start + i < t.rows ? start + i : -1;
    return in_image(top + i / kImageColumns, left + i % kImageColumns);
  }
  __device__ int slot(int i) const {
    return t.first + (t.across == 0 ? i : i / kImageColumns * t.pitch + i % kImageColumns);
  }
  __device__ int64_t row_of_slot(int slot) const {
    if (t.across == 0) {
      const int64_t row = start - t.first + slot;
      return 0 <= row && row < t.rows ? row : -1;
    }
    return in_image(top - 1 + slot / t.pitch, left - 1 + slot % t.pitch);
  }
  // Its pixels in the images
  __device__ int count() const {
    if (t.across == 0) return static_cast<int>(t.rows - start < t.tile ? t.rows - start : t.tile);
    const int rows = t.height - top, columns = t.width - left, most = t.tile / kImageColumns;
    return (rows < most ? rows : most) * (columns < kImageColumns ? columns : kImageColumns);
  }
  // Those of pixel i's neighbours that are in the image; none for a pixel outside
  __device__ unsigned taps(int i) const {
    const int64_t r = row(i);
    if (r < 0) return 0;
    int64_t x, y;
    divide(divide(r, t.width, x), t.height, y);
    return taps_inside(static_cast<int>(y), static_cast<int>(x), t.height, t.width);
  }
};

}  // namespace densenet_fast::cuda
