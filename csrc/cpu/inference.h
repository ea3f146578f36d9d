// What the ops of inference share: a normalisation by running statistics, and the division of small products.
//
//   y = (x - mean) * scale + shift,   scale = weight / sqrt(var + eps)
#pragma once

#include "tiles.h"

namespace densenet_fast {

// weight, bias, running_mean, running_var, [cols] each; the first two are empty if absent
constexpr size_t kNormTensors = 4;

struct FrozenNorm {
  int64_t cols;
  const float* mean;
  std::vector<float> scale, shift;

  FrozenNorm(const Tensor* tensors, double eps, int64_t cols)
      : cols(cols), mean(vector(tensors[2], cols, "running_mean")), scale(cols), shift(cols) {
    const float* var = vector(tensors[3], cols, "running_var");
    const float epsilon = eps;
    for (int64_t c = 0; c < cols; ++c) scale[c] = 1.0f / std::sqrt(var[c] + epsilon);
    if (tensors[0].numel() > 0) {
      const float* weight = vector(tensors[0], cols, "weight");
      for (int64_t c = 0; c < cols; ++c) scale[c] *= weight[c];
    }
    if (tensors[1].numel() > 0) std::copy_n(vector(tensors[1], cols, "bias"), cols, shift.begin());
  }

  Affine affine() const { return {mean, scale.data(), shift.data()}; }
};

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

}  // namespace densenet_fast
