// The gradient of columns completed, and the sums that tiles left, combined.
//
//   dF = G + (P + 2 * Q * (F - mu)) / M                                                                    (1)
#include "columns.h"

namespace densenet_fast::cuda {
namespace {

template <typename T, int V>
__global__ __launch_bounds__(kThreads, 2) void finalise_kernel(const Finalise p) {
  using A = Accumulated<T>;
  const Place at(p.tiling, p.x.rows, p.x.cols, V);
  if (at.valid <= 0) return;
  const A count = static_cast<A>(p.count_tensor == nullptr ? p.count : *p.count_tensor);
  A mean[V], constant[V], slope[V];
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < at.valid) {
      mean[i] = static_cast<const A*>(p.mean)[at.col + i];
      constant[i] = static_cast<const A*>(p.p)[at.col + i] / count;
      slope[i] = 2 * static_cast<const A*>(p.q)[at.col + i] / count;
    }
  for (int64_t r = at.first + at.y; r < at.last; r += at.stride()) {
    const int n = at.rows_from(r);
    Pack<T, V> grad[kUnroll], x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (j < n) {
        grad[j].load(row<const T>(p.grad, r + j * at.lanes, at.col), at.valid);
        x[j].load(row<const T>(p.x, r + j * at.lanes, at.col), at.valid);
      }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (j < n) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (i < at.valid) {
            const A through = constant[i] + slope[i] * (widen(x[j].values[i]) - mean[i]);
            grad[j].values[i] = narrow<T>(widen(grad[j].values[i]) + through);
          }
        grad[j].store(row<T>(p.out, r + j * at.lanes, at.col), at.valid);
      }
  }
}

template <typename A>
__global__ __launch_bounds__(kThreads, 2) void combine_sums_kernel(const CombineSums p) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kCombineColumns + threadIdx.x;
  const A* partials = static_cast<const A*>(p.partials) + col;
  const Pair<A> sums = combine_tiles<Pair<A>>(p.tiles, [&](int64_t t) {
    if (col >= p.cols) return Pair<A>();
    return Pair<A>{partials[2 * t * p.cols], partials[(2 * t + 1) * p.cols]};
  });
  if (threadIdx.y > 0 || col >= p.cols) return;
  static_cast<A*>(p.sum_d)[col] = sums.first;
  static_cast<A*>(p.sum_dx)[col] = sums.second;
}

}  // namespace

const char* finalise(const Finalise& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    return launch(finalise_kernel<T, V>, blocks(p.tiling), threads(p.tiling), 0, stream, p);
  });
}

const char* combine_sums(const CombineSums& p, Type type, void* stream) {
  return by_accumulation(type, [&]<typename A>(A) {
    return launch(combine_sums_kernel<A>, combining_blocks(p.cols), dim3(kCombineColumns, kCombineLanes),
                  kThreads * sizeof(Pair<A>), stream, p);
  });
}

}  // namespace densenet_fast::cuda
