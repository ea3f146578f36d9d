// How rows and columns are divided among blocks and lanes.
#include <algorithm>

#include "kernels.h"

namespace densenet_fast::cuda {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Tiling tiling(int64_t rows, int64_t cols, int width, int64_t blocks) {
  constexpr int64_t kWarp = 32;
  const int64_t groups = ceil_divide(cols, width), column_blocks = ceil_divide(groups, kWarp);
  Tiling t;
  t.column_blocks = static_cast<int>(column_blocks);
  t.x = static_cast<int>(ceil_divide(groups, column_blocks));
  t.y = kThreads / t.x;
  const int64_t step = static_cast<int64_t>(kUnroll) * t.y;
  const int64_t most = std::max<int64_t>(blocks / column_blocks, 1);
  t.tile_rows = ceil_divide(ceil_divide(rows, most), step) * step;
  t.tiles = ceil_divide(rows, t.tile_rows);
  return t;
}

Pixels pixels(int64_t images, int64_t height, int64_t width, int tile) {
  constexpr int64_t kWidest = 64;  // images of more pixels a row would need too many of their neighbours' rows
  constexpr int kColumns = 16;
  Pixels p{};
  p.rows = static_cast<int>(images * height * width);
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.tile = tile;
  if (width <= kWidest) {
    p.tiles = static_cast<int>(ceil_divide(p.rows, tile));
    p.pitch = p.width;
    p.first = p.width + 1;
    p.slots = tile + 2 * p.first;
  } else {
    p.across = static_cast<int>(ceil_divide(width, kColumns));
    p.down = static_cast<int>(ceil_divide(height, tile / kColumns));
    p.tiles = static_cast<int>(images * p.across * p.down);
    p.pitch = kColumns + 2;
    p.first = p.pitch + 1;
    p.slots = (tile / kColumns + 2) * p.pitch;
  }
  return p;
}

}  // namespace densenet_fast::cuda
