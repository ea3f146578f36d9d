// The tiles that a batch of images is divided into for 3x3 windows: their pixels, and the pixels that their windows
// hold.
#pragma once

#include "columns.h"

namespace densenet_fast::cuda {

constexpr int kImageColumns = 16;  // of a tile in a wide image
constexpr int kImagePitch = kImageColumns + 2;

// The bit of a neighbour's tap, dy * 3 + dx + 4, is set if it is in the image
__device__ inline unsigned taps_inside(int y, int x, int height, int width) {
  const unsigned rows = (y > 0 ? 0x7 : 0) | 0x38 | (y + 1 < height ? 0x1C0 : 0);
  const unsigned columns = (x > 0 ? 0x49 : 0) | 0x92 | (x + 1 < width ? 0x124 : 0);
  return rows & columns;
}

// The slots from a pixel to its neighbour of a tap
__device__ inline int slots_to(int tap, int pitch) { return (tap / 3 - 1) * pitch + tap % 3 - 1; }

struct Position {
  int image, y, x;
};

// A tile's pixels, numbered from 0, and the slots of its windows
struct Tile {
  const Pixels& t;
  int start;      // the first pixel; where a tile is of one image, the image's
  int top, left;  // where it starts in its image

  __device__ Tile(const Pixels& pixels, int tile) : t(pixels), top(0), left(0) {
    if (consecutive()) {
      start = tile * t.tile;
      return;
    }
    const unsigned row = static_cast<unsigned>(tile) / static_cast<unsigned>(t.across);
    left = (tile - static_cast<int>(row) * t.across) * kImageColumns;
    const unsigned image = row / static_cast<unsigned>(t.down);
    top = static_cast<int>(row - image * t.down) * (t.tile / kImageColumns);
    start = static_cast<int>(image) * t.height * t.width;
  }

  __device__ bool consecutive() const { return t.across == 0; }
  // Whether pixel i is in an image, and where: rows of matrices
  __device__ bool inside(int i) const {
    if (consecutive()) return i < t.rows - start;
    return top + i / kImageColumns < t.height && left + i % kImageColumns < t.width;
  }
  __device__ int row(int i) const {
    if (consecutive()) return start + i;
    return start + (top + i / kImageColumns) * t.width + left + i % kImageColumns;
  }
  __device__ Position position(int i) const {
    const unsigned r = static_cast<unsigned>(row(i)), line = r / static_cast<unsigned>(t.width);
    const unsigned image = line / static_cast<unsigned>(t.height);
    return {static_cast<int>(image), static_cast<int>(line - image * t.height), static_cast<int>(r - line * t.width)};
  }
  // Those of its neighbours that are in the image; none for a pixel outside
  __device__ unsigned taps(int i) const {
    if (!inside(i)) return 0;
    const Position at = position(i);
    return taps_inside(at.y, at.x, t.height, t.width);
  }
  __device__ int count() const {
    if (consecutive()) return t.rows - start < t.tile ? t.rows - start : t.tile;
    const int rows = t.height - top, columns = t.width - left, most = t.tile / kImageColumns;
    return (rows < most ? rows : most) * (columns < kImageColumns ? columns : kImageColumns);
  }

  __device__ int slot(int i) const {
    return t.first + (consecutive() ? i : i / kImageColumns * kImagePitch + i % kImageColumns);
  }
  // In a tile of one image
  __device__ bool slot_inside(int slot) const {
    const int y = top - 1 + slot / kImagePitch, x = left - 1 + slot % kImagePitch;
    return 0 <= y && y < t.height && 0 <= x && x < t.width;
  }
  __device__ int row_of_slot(int slot) const {
    return start + (top - 1 + slot / kImagePitch) * t.width + left - 1 + slot % kImagePitch;
  }
};

}  // namespace densenet_fast::cuda
