// Minimal filtering in one dimension, F(M, 3) of Winograd 1980: M results y of a filter g of three taps over M + 2
// values d by as many products, and the filter's gradient:
//
//   y = A^T [(G g) . (B^T d)]      dg = G^T [(A dy) . (B^T d)]
//
// F(2, 3) interpolates at 0, 1, -1 and infinity, F(4, 3) at 0, a, -a, b, -b and infinity (Toom and Cook's
// construction). a = 3/4 and b = 1/a rounded least of the points tried: what counts is how far the powers of the points
// are from 1 (Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
// Networks", https://arxiv.org/abs/1803.10986). Vectors are `from` and `to` apart.
//
// Example:
//
//   float d[4] = {1, 2, 3, 4}, g[3] = {1, 0, -1}, v[4], u[4], y[2];
//   Filtering<2>::input(d, 1, v, 1);
//   Filtering<2>::filter(g, 1, u, 1);
//   for (int i = 0; i < 4; ++i) u[i] *= v[i];
//   Filtering<2>::output(u, 1, y, 1);  // y[i] = d[i] * g[0] + d[i + 1] * g[1] + d[i + 2] * g[2]
#pragma once

namespace densenet_fast {
namespace {

template <int M>
struct Filtering;

template <>
struct Filtering<2> {
  // B^T d
  template <typename V>
  static void input(const V* d, int from, V* out, int to) {
    out[0] = d[0] - d[2 * from];
    out[to] = d[from] + d[2 * from];
    out[2 * to] = d[2 * from] - d[from];
    out[3 * to] = d[from] - d[3 * from];
  }

  // A^T m
  template <typename V>
  static void output(const V* m, int from, V* out, int to) {
    out[0] = m[0] + m[from] + m[2 * from];
    out[to] = m[from] - m[2 * from] - m[3 * from];
  }

  // A y
  template <typename V>
  static void gradient(const V* y, int from, V* out, int to) {
    out[0] = y[0];
    out[to] = y[0] + y[from];
    out[2 * to] = y[0] - y[from];
    out[3 * to] = -y[from];
  }

  // G g
  template <typename V>
  static void filter(const V* g, int from, V* out, int to) {
    out[0] = g[0];
    out[to] = 0.5f * (g[0] + g[2 * from] + g[from]);
    out[2 * to] = 0.5f * (g[0] + g[2 * from] - g[from]);
    out[3 * to] = g[2 * from];
  }

  // G^T u
  template <typename V>
  static void filter_gradient(const V* u, int from, V* out, int to) {
    const V sum = 0.5f * (u[from] + u[2 * from]);
    out[0] = u[0] + sum;
    out[to] = 0.5f * (u[from] - u[2 * from]);
    out[2 * to] = u[3 * from] + sum;
  }
};

template <>
struct Filtering<4> {
  static constexpr double kPointA = 3. / 4, kPointB = 4. / 3, kSquareA = kPointA * kPointA,
                          kSquareB = kPointB * kPointB;
  static constexpr float a = kPointA, b = kPointB, a2 = kSquareA, b2 = kSquareB, a3 = kPointA * kSquareA,
                         b3 = kPointB * kSquareB;
  static constexpr float squares = kSquareA + kSquareB;
  // 1 / (2 p^2 (p^2 - q^2)) for p = a and q = b, and the other way round
  static constexpr double kOfA = 0.5 / (kSquareA * (kSquareA - kSquareB)),
                          kOfB = 0.5 / (kSquareB * (kSquareB - kSquareA));

  // sum + difference and sum - difference
  template <typename V>
  static void both(V sum, V difference, V* out, int to) {
    out[0] = sum + difference;
    out[to] = sum - difference;
  }

  template <typename V>
  static void input(const V* d, int from, V* out, int to) {
    const V d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from];
    out[0] = d[0] + d4 - squares * d2;
    both<V>(d4 - b2 * d2, a * d3 - b * d1, out + to, to);
    both<V>(d4 - a2 * d2, b * d3 - a * d1, out + 3 * to, to);
    out[5 * to] = d1 + d[5 * from] - squares * d3;
  }

  template <typename V>
  static void output(const V* m, int from, V* out, int to) {
    const V sum_a = m[from] + m[2 * from], difference_a = m[from] - m[2 * from];
    const V sum_b = m[3 * from] + m[4 * from], difference_b = m[3 * from] - m[4 * from];
    out[0] = m[0] + sum_a + sum_b;
    out[to] = a * difference_a + b * difference_b;
    out[2 * to] = a2 * sum_a + b2 * sum_b;
    out[3 * to] = a3 * difference_a + b3 * difference_b + m[5 * from];
  }

  template <typename V>
  static void gradient(const V* y, int from, V* out, int to) {
    const V y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
    out[0] = y0;
    both<V>(y0 + a2 * y2, a * y1 + a3 * y3, out + to, to);
    both<V>(y0 + b2 * y2, b * y1 + b3 * y3, out + 3 * to, to);
    out[5 * to] = y3;
  }

  template <typename V>
  static void filter(const V* g, int from, V* out, int to) {
    const V g0 = g[0], g1 = g[from], g2 = g[2 * from];
    constexpr float a0 = kOfA, a1 = kOfA * kPointA, a2 = kOfA * kSquareA;
    constexpr float b0 = kOfB, b1 = kOfB * kPointB, b2 = kOfB * kSquareB;
    out[0] = g0;
    both<V>(a0 * g0 + a2 * g2, a1 * g1, out + to, to);
    both<V>(b0 * g0 + b2 * g2, b1 * g1, out + 3 * to, to);
    out[5 * to] = g2;
  }

  template <typename V>
  static void filter_gradient(const V* u, int from, V* out, int to) {
    const V sum_a = u[from] + u[2 * from], difference_a = u[from] - u[2 * from];
    const V sum_b = u[3 * from] + u[4 * from], difference_b = u[3 * from] - u[4 * from];
    constexpr float a0 = kOfA, a1 = kOfA * kPointA, a2 = kOfA * kSquareA;
    constexpr float b0 = kOfB, b1 = kOfB * kPointB, b2 = kOfB * kSquareB;
    out[0] = u[0] + a0 * sum_a + b0 * sum_b;
    out[to] = a1 * difference_a + b1 * difference_b;
    out[2 * to] = u[5 * from] + a2 * sum_a + b2 * sum_b;
  }
};

}  // namespace
}  // namespace densenet_fast
