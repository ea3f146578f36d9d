// What the CPU kernels compute, as plain loops: no tiles, threads, vectors or minimal filtering. Read this file first.
// The library does without it; tests/backends/test_plain_loops.py compiles it, with Real = double and with Real =
// float, and holds the fast kernels against it.
//
// A feature map is a matrix x [M, C] with a row for each pixel of all images and a column for each channel.
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = dA * (y > 0)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifndef REAL
#define REAL double
#endif
using Real = REAL;
using Map = std::vector<Real>;

struct Input {
  const Real* x;                     // [rows, cols]
  const Real *mean, *scale, *shift;  // [cols]
  int64_t rows, cols;

  Real centred(int64_t m, int64_t c) const { return x[m * cols + c] - mean[c]; }
  Real y(int64_t m, int64_t c) const { return centred(m, c) * scale[c] + shift[c]; }
  Real a(int64_t m, int64_t c) const { return std::max<Real>(y(m, c), 0); }
};

// The windows of a convolution or a pooling over images [images, *sizes]. A missing dimension has size 1, and windows
// of 1 at distance 1.
struct Windows {
  int64_t images, sizes[3], window[3], stride[3], padding[3];

  int64_t pooled(int d) const { return (sizes[d] + 2 * padding[d] - window[d]) / stride[d] + 1; }
  int64_t outputs() const { return images * pooled(0) * pooled(1) * pooled(2); }
  int64_t taps() const { return window[0] * window[1] * window[2]; }

  // f(output, tap, pixel): the rows of an output and of a pixel in its window, for all pixels that exist
  template <typename F>
  void each(F f) const {
    for (int64_t output = 0; output < outputs(); ++output) {
      for (int64_t tap = 0; tap < taps(); ++tap) {
        int64_t pixel = 0, rows = 1, o = output, t = tap;
        bool inside = true;
        for (int d = 2; d >= 0; o /= pooled(d), t /= window[d], rows *= sizes[d], --d) {
          const int64_t at = o % pooled(d) * stride[d] - padding[d] + t % window[d];
          inside &= 0 <= at && at < sizes[d];
          pixel += at * rows;
        }
        if (inside) f(output, tap, o * rows + pixel);
      }
    }
  }
};

extern "C" {

// mean, biased variance and rstd = 1 / sqrt(var + eps) [cols] of the columns of x [rows, cols]
void statistics(const Real* x, int64_t rows, int64_t cols, Real eps, Real* mean, Real* var, Real* rstd) {
  for (int64_t c = 0; c < cols; ++c) {
    Real sum = 0, squares = 0;
    for (int64_t m = 0; m < rows; ++m) sum += x[m * cols + c];
    mean[c] = sum / rows;
    for (int64_t m = 0; m < rows; ++m) squares += (x[m * cols + c] - mean[c]) * (x[m * cols + c] - mean[c]);
    var[c] = squares / rows;
    rstd[c] = 1 / std::sqrt(var[c] + eps);
  }
}

// out = A [rows, cols]
void bn_relu(const Input& in, Real* out) {
  for (int64_t m = 0; m < in.rows; ++m)
    for (int64_t c = 0; c < in.cols; ++c) out[m * in.cols + c] = in.a(m, c);
}

// From dA [rows, cols]: out = scale * D, sums [2, cols] = sum D, sum D * (x - mean)
void mask(const Input& in, const Real* grad, Real* out, Real* sums) {
  std::fill_n(sums, 2 * in.cols, Real(0));
  for (int64_t m = 0; m < in.rows; ++m)
    for (int64_t c = 0, i = m * in.cols; c < in.cols; ++c, ++i) {
      const Real d = in.y(m, c) > 0 ? grad[i] : 0;
      out[i] = in.scale[c] * d;
      sums[c] += d;
      sums[in.cols + c] += d * in.centred(m, c);
    }
}

// BN-ReLU-Conv of any kernel: out[o, k] = bias[k] + the sum of A[pixel, c] * weight[k, c, tap] over o's window and c
void bn_relu_conv(const Input& in, const Windows& windows, const Real* weight, const Real* bias, int64_t channels,
                  Real* out) {  // weight [channels, cols, taps], bias [channels] or null, out [outputs, channels]
  std::fill_n(out, windows.outputs() * channels, Real(0));
  windows.each([&](int64_t o, int64_t tap, int64_t pixel) {
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t c = 0; c < in.cols; ++c)
        out[o * channels + k] += in.a(pixel, c) * weight[(k * in.cols + c) * windows.taps() + tap];
  });
  for (int64_t i = 0; bias && i < windows.outputs() * channels; ++i) out[i] += bias[i % channels];
}

// The weight's gradient [channels, cols, taps] from grad [outputs, channels]
void bn_relu_conv_grad_weight(const Input& in, const Windows& windows, const Real* grad, int64_t channels,
                              Real* grad_weight) {
  std::fill_n(grad_weight, channels * in.cols * windows.taps(), Real(0));
  windows.each([&](int64_t o, int64_t tap, int64_t pixel) {
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t c = 0; c < in.cols; ++c)
        grad_weight[(k * in.cols + c) * windows.taps() + tap] += grad[o * channels + k] * in.a(pixel, c);
  });
}

// All gradients from grad [outputs, channels]: out, sums as of mask; grad_weight
void bn_relu_conv_backward(const Input& in, const Windows& windows, const Real* weight, const Real* grad,
                           int64_t channels, Real* out, Real* sums, Real* grad_weight) {
  Map grad_a(in.rows * in.cols);
  bn_relu_conv_grad_weight(in, windows, grad, channels, grad_weight);
  windows.each([&](int64_t o, int64_t tap, int64_t pixel) {
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t c = 0; c < in.cols; ++c)
        grad_a[pixel * in.cols + c] += grad[o * channels + k] * weight[(k * in.cols + c) * windows.taps() + tap];
  });
  mask(in, grad_a.data(), out, sums);
}

// The mean of A over windows, those of the head or of a transition: out [outputs, cols]
void bn_relu_mean(const Input& in, const Windows& windows, Real* out) {
  std::fill_n(out, windows.outputs() * in.cols, Real(0));
  windows.each([&](int64_t o, int64_t, int64_t pixel) {
    for (int64_t c = 0; c < in.cols; ++c) out[o * in.cols + c] += in.a(pixel, c);
  });
  for (int64_t i = 0; i < windows.outputs() * in.cols; ++i) out[i] /= windows.taps();
}

// Its gradient from grad [outputs, cols]
void bn_relu_mean_backward(const Input& in, const Windows& windows, const Real* grad, Real* out, Real* sums) {
  Map grad_a(in.rows * in.cols);
  windows.each([&](int64_t o, int64_t, int64_t pixel) {
    for (int64_t c = 0; c < in.cols; ++c) grad_a[pixel * in.cols + c] += grad[o * in.cols + c] / windows.taps();
  });
  mask(in, grad_a.data(), out, sums);
}

// The transition, in the order in which the kernel works: out = mean(A) @ weight^T + bias
void bn_relu_pool_conv1x1(const Input& in, const Windows& windows, const Real* weight, const Real* bias,
                          int64_t channels, Real* out) {  // weight [channels, cols], bias [channels] or null
  Map means(windows.outputs() * in.cols);
  bn_relu_mean(in, windows, means.data());
  for (int64_t o = 0; o < windows.outputs(); ++o)
    for (int64_t k = 0; k < channels; ++k) {
      Real sum = 0;
      for (int64_t c = 0; c < in.cols; ++c) sum += means[o * in.cols + c] * weight[k * in.cols + c];
      out[o * channels + k] = sum + (bias ? bias[k] : 0);
    }
}

// Its gradients: the means' is grad @ weight, the weight's grad^T @ mean(A)
void bn_relu_pool_conv1x1_backward(const Input& in, const Windows& windows, const Real* weight, const Real* grad,
                                   int64_t channels, Real* out, Real* sums, Real* grad_weight) {
  Map means(windows.outputs() * in.cols), grad_means(windows.outputs() * in.cols);
  bn_relu_mean(in, windows, means.data());
  std::fill_n(grad_weight, channels * in.cols, Real(0));
  for (int64_t o = 0; o < windows.outputs(); ++o)
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t c = 0; c < in.cols; ++c) {
        grad_means[o * in.cols + c] += grad[o * channels + k] * weight[k * in.cols + c];
        grad_weight[k * in.cols + c] += grad[o * channels + k] * means[o * in.cols + c];
      }
  bn_relu_mean_backward(in, windows, grad_means.data(), out, sums);
}

// out [outputs, cols] = the maximum of A over a window, argmax = the tap that it stands at: the first of equals
void bn_relu_maxpool(const Input& in, const Windows& windows, Real* out, uint8_t* argmax) {
  std::fill_n(out, windows.outputs() * in.cols, Real(-1));
  windows.each([&](int64_t o, int64_t tap, int64_t pixel) {
    for (int64_t c = 0, i = o * in.cols; c < in.cols; ++c, ++i)
      if (in.a(pixel, c) > out[i]) {
        out[i] = in.a(pixel, c);
        argmax[i] = static_cast<uint8_t>(tap);
      }
  });
}

// Its gradient from grad [outputs, cols]: a pixel has that of all windows whose maximum it is
void bn_relu_maxpool_backward(const Input& in, const Windows& windows, const Real* grad, const uint8_t* argmax,
                              Real* out, Real* sums) {
  Map grad_a(in.rows * in.cols);
  windows.each([&](int64_t o, int64_t tap, int64_t pixel) {
    for (int64_t c = 0; c < in.cols; ++c)
      if (argmax[o * in.cols + c] == tap) grad_a[pixel * in.cols + c] += grad[o * in.cols + c];
  });
  mask(in, grad_a.data(), out, sums);
}

// What reaches x through its batch's statistics, added: out = grad + (p + 2 * q * (x - mean)) / count; p, q [cols]
void finalise(const Input& in, const Real* grad, const Real* p, const Real* q, Real count, Real* out) {
  for (int64_t m = 0; m < in.rows; ++m)
    for (int64_t c = 0, i = m * in.cols; c < in.cols; ++c, ++i)
      out[i] = grad[i] + (p[c] + 2 * q[c] * in.centred(m, c)) / count;
}

// out = x * mask * scale, [count] each, where mask is 0 or 1
void dropout(const Real* x, const uint8_t* mask, int64_t count, Real scale, Real* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * (mask[i] * scale);
}

}  // extern "C"
