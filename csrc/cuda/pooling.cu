// The stem, BN-ReLU and the maximum over windows of 3, and the head, BN-ReLU and the mean over an image; forward and
// backward.
//
//   y = (x - mean) * scale + bias;   A = relu(y);   D = grad * (y > 0), and grad where y is NaN, as in stock's ReLU
#include "columns.h"

namespace densenet_fast::cuda {
namespace {

// Image and place along each dimension of row r of pixels of `sizes`
struct Coordinates {
  int64_t n;
  int u[3];

  __device__ Coordinates(const int (&sizes)[3], int64_t r) {
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      int64_t index;
      r = divide(r, sizes[d], index);
      u[d] = static_cast<int>(index);
    }
    n = r;
  }
};

__device__ inline int64_t pixel(const int (&sizes)[3], int64_t n, int u0, int u1, int u2) {
  return ((n * sizes[0] + u0) * sizes[1] + u1) * sizes[2] + u2;
}

// The first of equal maxima, and a NaN before all numbers: stock's
template <typename T, int V, bool STATISTICS>
__global__ __launch_bounds__(kThreads, 2) void bn_relu_maxpool_kernel(const MaxPool p) {
  using A = Accumulated<T>;
  const Place at(p.tiling, p.out.rows, p.out.cols, V);
  AffineColumn<A> affine[V];
  load_affine<T>(affine, p.affine, at);
  Moments<A> moments[V];
  const int (&sizes)[3] = p.pooling.sizes;
  for (int64_t r = at.first + at.y; r < at.last && at.valid > 0; r += at.lanes) {
    const Coordinates o(p.pooling.pooled, r);
    A best[V];
    Pack<unsigned char, V> position;
#pragma unroll
    for (int i = 0; i < V; ++i) best[i] = -1, position.values[i] = 0;
    for (int a = 0; a < 3; ++a) {
      const int u0 = 2 * o.u[0] - 1 + a;
      if (u0 < 0 || u0 >= sizes[0]) continue;
      for (int b = 0; b < 3; ++b) {
        const int u1 = 2 * o.u[1] - 1 + b;
        if (u1 < 0 || u1 >= sizes[1]) continue;
        Pack<T, V> x[3];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const int u2 = 2 * o.u[2] - 1 + c;
          if (u2 >= 0 && u2 < sizes[2]) x[c].load(row<const T>(p.x, pixel(sizes, o.n, u0, u1, u2), at.col), at.valid);
        }
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const int u2 = 2 * o.u[2] - 1 + c;
          if (u2 < 0 || u2 >= sizes[2]) continue;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            if (i >= at.valid) continue;
            const A y = relu(affine[i](widen(x[c].values[i])));
            if (y > best[i] || y != y) {
              best[i] = y;
              position.values[i] = static_cast<unsigned char>(9 * a + 3 * b + c - p.pooling.centre);
            }
          }
        }
      }
    }
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.values[i] = narrow<T>(best[i]);
    out.store(row<T>(p.out, r, at.col), at.valid);
    position.store(p.argmax + r * p.out.cols + at.col, at.valid);
    if constexpr (STATISTICS) add_row(moments, out, at.valid);
  }
  if constexpr (STATISTICS) store_partials<A>(moments, p.partials, at, p.tiling, p.out.cols);
}

// total += the gradients of the outputs, of those whose windows hold pixel r, that it is the maximum of
template <typename T, int V, typename A>
__device__ void gather_maxima(const PoolBackward& p, const Place& at, int64_t r, A (&total)[V]) {
  const Coordinates u(p.pooling.sizes, r);
  const int (&pooled)[3] = p.pooling.pooled;
  for (int a = u.u[0] / 2; a <= (u.u[0] + 1) / 2 && a < pooled[0]; ++a)
    for (int b = u.u[1] / 2; b <= (u.u[1] + 1) / 2 && b < pooled[1]; ++b)
      for (int c = u.u[2] / 2; c <= (u.u[2] + 1) / 2 && c < pooled[2]; ++c) {
        const int64_t o = pixel(pooled, u.n, a, b, c);
        const int place = 9 * (u.u[0] - 2 * a + 1) + 3 * (u.u[1] - 2 * b + 1) + u.u[2] - 2 * c + 1 - p.pooling.centre;
        Pack<T, V> grad;
        Pack<unsigned char, V> position;
        grad.load(row<const T>(p.grad, o, at.col), at.valid);
        position.load(p.argmax + o * p.x.cols + at.col, at.valid);
#pragma unroll
        for (int i = 0; i < V; ++i)
          if (position.values[i] == place) total[i] += widen(grad.values[i]);
      }
}

template <typename T, int V, bool MAXIMUM>
__global__ __launch_bounds__(kThreads, 2) void bn_relu_pool_backward_kernel(const PoolBackward p) {
  using A = Accumulated<T>;
  const Place at(p.tiling, p.x.rows, p.x.cols, V);
  AffineColumn<A> affine[V];
  load_affine<T>(affine, p.affine, at);
  Pair<A> sums[V];
  for (int64_t r = at.first + at.y; r < at.last && at.valid > 0; r += at.lanes) {
    Pack<T, V> x;
    x.load(row<const T>(p.x, r, at.col), at.valid);
    A grad[V] = {};
    if constexpr (MAXIMUM) {
      gather_maxima<T>(p, at, r, grad);
    } else {
      int64_t unused;
      Pack<T, V> of_image;
      of_image.load(row<const T>(p.grad, divide(r, p.pixels, unused), at.col), at.valid);
#pragma unroll
      for (int i = 0; i < V; ++i) grad[i] = widen(of_image.values[i]) / static_cast<A>(p.pixels);
    }
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A value = widen(x.values[i]);
      const A d = affine[i](value) <= 0 ? A(0) : grad[i];
      sums[i].first += d;
      sums[i].second += d * (value - affine[i].mean);
      out.values[i] = narrow<T>(affine[i].scale * d);
    }
    out.store(row<T>(p.out, r, at.col), at.valid);
  }
  store_partials<A>(sums, p.partials, at, p.tiling, p.x.cols);
}

template <typename A>
struct Sum {
  A value = 0;

  __device__ void add(const Sum& other) { value += other.value; }
};

// A block for each image and column block
template <typename T, int V>
__global__ __launch_bounds__(kThreads, 2) void bn_relu_global_avgpool_kernel(const AveragePool p) {
  using A = Accumulated<T>;
  const Place at(p.tiling, p.x.rows, p.x.cols, V);
  AffineColumn<A> affine[V];
  load_affine<T>(affine, p.affine, at);
  Sum<A> sums[V];
  for (int64_t r = at.first + at.y; r < at.last && at.valid > 0; r += at.stride()) {
    const int n = at.rows_from(r);
    Pack<T, V> x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (j < n) x[j].load(row<const T>(p.x, r + j * at.lanes, at.col), at.valid);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (j < n) sums[i].value += relu(affine[i](widen(x[j].values[i])));
  }
  combine_lanes(sums, static_cast<Sum<A>*>(shared_memory()), at.x, at.y, p.tiling.x, p.tiling.y);
  if (at.y > 0 || at.valid <= 0) return;
  Pack<T, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) out.values[i] = narrow<T>(sums[i].value / static_cast<A>(p.pixels));
  out.store(row<T>(p.out, at.tile, at.col), at.valid);
}

}  // namespace

const char* bn_relu_maxpool(const MaxPool& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    const size_t bytes = p.partials ? combining_bytes<Moments<Accumulated<T>>>(p.tiling, V) : 0;
    return launch(p.partials ? bn_relu_maxpool_kernel<T, V, true> : bn_relu_maxpool_kernel<T, V, false>,
                  blocks(p.tiling), threads(p.tiling), bytes, stream, p);
  });
}

const char* bn_relu_pool_backward(const PoolBackward& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    const size_t bytes = combining_bytes<Pair<Accumulated<T>>>(p.tiling, V);
    return launch(p.argmax ? bn_relu_pool_backward_kernel<T, V, true> : bn_relu_pool_backward_kernel<T, V, false>,
                  blocks(p.tiling), threads(p.tiling), bytes, stream, p);
  });
}

const char* bn_relu_global_avgpool(const AveragePool& p, Type type, void* stream) {
  return by_type(type, p.width, [&]<typename T, int V>(T, Width<V>) {
    const size_t bytes = combining_bytes<Sum<Accumulated<T>>>(p.tiling, V);
    return launch(bn_relu_global_avgpool_kernel<T, V>, blocks(p.tiling), threads(p.tiling), bytes, stream, p);
  });
}

}  // namespace densenet_fast::cuda
