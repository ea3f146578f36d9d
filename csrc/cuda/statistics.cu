// New features into columns of a wider matrix, and the statistics of columns, from one read.
//
//   F[:, C:C+k] = source * (mask ? keep_scale : 0)
//   mu, v, r = mean, biased variance and 1 / sqrt(v + eps) of what was stored
//
// A lane's rows enter by Welford's update, lanes and tiles by Chan, Golub and LeVeque's; never E[x^2] - E[x]^2.
#include "tile.h"

namespace densenet_fast::cuda {
namespace {

constexpr int kPadding = 2;  // elements between a transposed tile's columns, against conflicts of shared memory's banks

// The block's next rows into shared memory, adjacent threads reading adjacent rows: [columns, rows + kPadding]
template <typename T, int V>
__device__ void load_transposed(const Append& p, const Place& at, int64_t r, int64_t first_col, T* tile) {
  const int rows = kUnroll * at.lanes, cols = p.tiling.x * V;
  for (int e = at.y * p.tiling.x + at.x; e < rows * cols; e += p.tiling.x * p.tiling.y) {
    const int col = e / rows, i = e - col * rows;
    if (r + i < at.last && first_col + col < p.out.cols) {
      const int64_t from = offset(p.source, r + i) + (first_col + col) * p.source.column;
      tile[col * (rows + kPadding) + i] = static_cast<const T*>(p.source.data)[from];
    }
  }
}

template <typename T, int V, bool TRANSPOSED>
__global__ __launch_bounds__(kThreads, 2) void append_kernel(const Append p) {
  using A = Accumulated<T>;
  const Place at(p.tiling, p.out.rows, p.out.cols, V);
  const unsigned char* mask = static_cast<const unsigned char*>(p.mask.data);
  Moments<A> moments[V];
  for (int64_t start = at.first; start < at.last; start += at.stride()) {
    const int64_t r = start + at.y;
    const int n = at.valid > 0 ? at.rows_from(r) : 0;
    Pack<T, V> values[kUnroll];
    if constexpr (TRANSPOSED) {
      T* tile = static_cast<T*>(shared_memory());
      __syncthreads();
      load_transposed<T, V>(p, at, start, at.col - at.x * V, tile);
      __syncthreads();
      const int pitch = kUnroll * at.lanes + kPadding;
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (j < n && i < at.valid) values[j].values[i] = tile[(at.x * V + i) * pitch + at.y + j * at.lanes];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kUnroll; ++j)
        if (j < n) {
          const int64_t from = offset(p.source, r + j * at.lanes) + at.col;
          values[j].load(static_cast<const T*>(p.source.data) + from, at.valid);
        }
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (j >= n) continue;
      if (mask != nullptr) {
        const unsigned char* keep = mask + offset(p.mask, r + j * at.lanes) + at.col * p.mask.column;
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (i < at.valid) {
            const A factor = keep[i * p.mask.column] ? static_cast<A>(p.keep_scale) : A(0);
            values[j].values[i] = narrow<T>(widen(values[j].values[i]) * factor);
          }
      }
      if (p.out.data != nullptr) values[j].store(row<T>(p.out, r + j * at.lanes, at.col), at.valid);
      if (p.partials != nullptr) add_row(moments, values[j], at.valid);
    }
  }
  if (p.partials != nullptr) store_partials<A>(moments, p.partials, at, p.tiling, p.out.cols);
}

// The rows of tile t
__device__ int64_t rows_of_tile(const CombineStatistics& p, int64_t t) {
  if (p.pixels.across > 0) return Tile(p.pixels, static_cast<int>(t)).count();
  const int64_t rest = p.rows - t * p.tiling.tile_rows;
  return rest < p.tiling.tile_rows ? rest : p.tiling.tile_rows;
}

template <typename A>
__global__ __launch_bounds__(kThreads, 2) void combine_statistics_kernel(const CombineStatistics p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kCombineColumns + threadIdx.x;
  const A* partials = static_cast<const A*>(p.partials) + col;
  const Moments<A> total = combine_tiles<Moments<A>>(p.tiling.tiles, [&](int64_t t) {
    if (col >= p.cols) return Moments<A>();
    return Moments<A>{static_cast<A>(rows_of_tile(p, t)), partials[2 * t * p.cols], partials[(2 * t + 1) * p.cols]};
  });
  if (threadIdx.y > 0 || col >= p.cols) return;
  static_cast<A*>(p.mean)[col] = total.mean;
  const A var = total.m2 / total.count;
  static_cast<A*>(p.var)[col] = var;
  static_cast<A*>(p.rstd)[col] = 1 / sqrt(var + static_cast<A>(p.eps));
}

}  // namespace

const char* append(const Append& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    const size_t moments = p.partials ? combining_bytes<Moments<Accumulated<T>>>(p.tiling, V) : 0;
    const size_t columns = p.tiling.x * V;
    const size_t tile = p.transposed ? columns * (kUnroll * p.tiling.y + kPadding) * sizeof(T) : 0;
    return launch(p.transposed ? append_kernel<T, V, true> : append_kernel<T, V, false>, blocks(p.tiling),
                  threads(p.tiling), moments > tile ? moments : tile, stream, p);
  });
}

const char* combine_statistics(const CombineStatistics& p, Type type, void* stream) {
  return by_accumulation(type, [&]<typename A>(A) {
    return launch(combine_statistics_kernel<A>, combining_blocks(p.cols), dim3(kCombineColumns, kCombineLanes),
                  kThreads * sizeof(Moments<A>), stream, p);
  });
}

}  // namespace densenet_fast::cuda
