// The gradient of columns completed, and the sums that tiles left, combined.
//
//   dF = G + (P + 2 * Q * (F - mu)) / M                                                                    (1)
//   P -= s * sum D;   Q -= s * r^2 * sum D * (F - mu) / 2                                                  (2)
//   dg = r * sum D * (F - mu);   db = sum D
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

template <typename T>
__global__ __launch_bounds__(kThreads, 2) void combine_sums_kernel(const CombineSums p) {
  using A = Accumulated<T>;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kCombineColumns + threadIdx.x;
  const A* partials = static_cast<const A*>(p.partials) + col;
  const Pair<A> sums = combine_tiles<Pair<A>>(p.tiles, [&](int64_t t) {
    if (col >= p.cols) return Pair<A>();
    return Pair<A>{partials[2 * t * p.cols], partials[(2 * t + 1) * p.cols]};
  });
  if (threadIdx.y > 0 || col >= p.cols) return;
  const A sum_d = sums.first, sum_dx = sums.second;
  if (p.sum_d != nullptr) static_cast<A*>(p.sum_d)[col] = sum_d;
  if (p.sum_dx != nullptr) static_cast<A*>(p.sum_dx)[col] = sum_dx;
  const Reader& reader = p.reader;
  if (reader.bias != nullptr) store(reader.bias, reader.bias_type, col, sum_d);
  if (reader.p == nullptr && reader.weight == nullptr) return;
  const A rstd = static_cast<const A*>(p.affine.rstd)[col];
  if (reader.weight != nullptr) store(reader.weight, reader.weight_type, col, rstd * sum_dx);
  if (reader.p == nullptr) return;
  const A scale = scale_of<T>(p.affine, col);
  const A p_before = reader.p_before == nullptr ? A(0) : static_cast<const A*>(reader.p_before)[col];
  const A q_before = reader.q_before == nullptr ? A(0) : static_cast<const A*>(reader.q_before)[col];
  static_cast<A*>(reader.p)[col] = p_before - scale * sum_d;
  static_cast<A*>(reader.q)[col] = q_before - scale * rstd * rstd * sum_dx / 2;
}

}  // namespace

const char* finalise(const Finalise& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    return launch(finalise_kernel<T, V>, blocks(p.tiling), threads(p.tiling), 0, stream, p);
  });
}

const char* combine_sums(const CombineSums& p, Type type, void* stream) {
  return by_type(type, [&]<typename T>(T) {
    return launch(combine_sums_kernel<T>, combining_blocks(p.cols), dim3(kCombineColumns, kCombineLanes),
                  kThreads * sizeof(Pair<Accumulated<T>>), stream, p);
  });
}

}  // namespace densenet_fast::cuda
