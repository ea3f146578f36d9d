// The division of rows among torch's threads, and into tiles that stay in cache.
//
// Example:
//
//   const Matrix<const float> m(x, "x");
//   const Matrix<float> result(out, "out");
//   const Affine a = affine(mean, scale, shift, m.cols);
//   const Tiles tiles(m.rows, m.cols * sizeof(float));   // so many bytes of scratch a row
//   tiles.each([&](int64_t, int64_t first, int64_t n) {  // in parallel, n rows from the first on
//     kernels_of<float>().bn_relu(m.from(first), n, m.cols, a, result.from(first));
//   });
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "matrices.h"

namespace densenet_fast {

// Tiles that threads take from either end
class Remaining {
 public:
  void reset(int64_t begin, int64_t end) { range_ = pack(begin, end); }

  // -1 if there is none
  int64_t first() {
    return take([](uint32_t& begin, uint32_t&) { return begin++; });
  }
  int64_t last() {
    return take([](uint32_t&, uint32_t& end) { return --end; });
  }

 private:
  static uint64_t pack(uint32_t begin, uint32_t end) { return uint64_t{begin} << 32 | end; }

  template <typename F>
  int64_t take(F f) {
    uint64_t seen = range_;
    for (;;) {
      uint32_t begin = seen >> 32, end = seen;
      if (begin == end) return -1;
      const int64_t tile = f(begin, end);
      if (range_.compare_exchange_weak(seen, pack(begin, end))) return tile;
    }
  }

  alignas(64) std::atomic<uint64_t> range_{0};
};

// `rows` divided evenly into one chunk per thread, and each chunk into tiles whose scratch stays in the core's cache.
// The division, and with it every rounding, depends on nothing but the shape and the number of threads.
struct Tiles {
  int64_t rows, chunks, per_chunk;

  Tiles(int64_t rows, int64_t scratch_bytes_per_row)
      : Tiles(rows, std::clamp<int64_t>((384 << 10) / std::max<int64_t>(scratch_bytes_per_row, 1), 32, 1024), 16) {}

  // tiles of about `tile` rows, chunks of at least `least`
  Tiles(int64_t rows, int64_t tile, int64_t least) : rows(rows) {
    chunks = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(rows / least, 1));
    per_chunk = std::max<int64_t>((rows + tile * chunks - 1) / (tile * chunks), 1);
  }

  int64_t count() const { return chunks * per_chunk; }
  int64_t begin(int64_t tile) const { return rows * tile / count(); }
  int64_t largest() const { return (rows + count() - 1) / count(); }

  // What a thread's products hold of registers that other libraries use too is free again when it leaves them
  struct Release {
    ~Release() {
      if (kernels().release) kernels().release();
    }
  };

  // f(chunk) in parallel; a chunk's tiles are chunk * per_chunk ... (chunk + 1) * per_chunk
  template <typename F>
  void run(F f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const Release release;
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  }

  // f(each) in parallel, where each(g) calls g(tile, first row, rows) for tiles that nobody else has: the next of the
  // thread's own chunk or, when it has none left, the last of another's, whose thread is late. For tiles that nothing
  // is summed over.
  template <typename F>
  void share(F f) const {
    std::vector<Remaining> remaining(chunks);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) remaining[chunk].reset(chunk * per_chunk, (chunk + 1) * per_chunk);
    run([&](int64_t chunk) {
      f([&](auto g) {
        for (int64_t i = 0; i < chunks; ++i) {
          Remaining& tiles = remaining[(chunk + i) % chunks];
          for (int64_t tile; (tile = i == 0 ? tiles.first() : tiles.last()) >= 0;) {
            const int64_t row = begin(tile), n = begin(tile + 1) - row;
            if (n > 0) g(tile, row, n);
          }
        }
      });
    });
  }

  // f(tile, first row, rows) in parallel, a chunk's tiles in their order
  template <typename F>
  void each(F f) const {
    run([&](int64_t chunk) {
      for (int64_t tile = chunk * per_chunk; tile < (chunk + 1) * per_chunk; ++tile) {
        const int64_t first = begin(tile), n = begin(tile + 1) - first;
        if (n > 0) f(tile, first, n);
      }
    });
  }
};

}  // namespace densenet_fast
