// The kernels on row tiles that hold no product.
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0), and grad where y is NaN, as in stock's ReLU
#pragma once

#include "vectors.h"

namespace densenet_fast {
namespace {

// several rows at a time, so that a column's vectors are loaded once for all
template <int ROWS, typename T>
inline void bn_relu_rows(const T* x, int64_t ld, int64_t cols, Affine affine, T* out, int64_t out_ld, int64_t ahead) {
  columns(cols, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
    const floats<N> shift = load<N>(affine.shift + c);
    for (int i = 0; i < ROWS; ++i) {
      __builtin_prefetch(x + i * ld + ahead + c, 0, 2);
      store<N>(out + i * out_ld + c, relu((load<N>(x + i * ld + c) - mean) * scale + shift));
    }
  });
}

template <typename T>
void bn_relu(const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out, int64_t out_ld) {
  const int64_t next_tile = rows * ld;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) bn_relu_rows<4>(x + r * ld, ld, cols, affine, out + r * out_ld, out_ld, next_tile);
  for (; r < rows; ++r) bn_relu_rows<1>(x + r * ld, ld, cols, affine, out + r * out_ld, out_ld, next_tile);
}

// in double and by the distance from the first row, so that nothing is lost where a column is constant but for a few
template <typename T>
void statistics(const T* x, int64_t ld, int64_t rows, int64_t cols, double* mean, double* m2) {
  lines(cols, [&]<int N>(int64_t c) {
    const floats<N> first = load<N>(x + c);
    Moments<N> moments;
    for (int64_t r = 1; r < rows; ++r) moments.add(load<N>(x + r * ld + c), first);
    moments.store(first, static_cast<double>(rows), mean + c, m2 + c);
  });
}

template <typename T>
constexpr int64_t kRowsPerStep = 4 / sizeof(T);  // of a panel

// calls row(r) for each row in turn and stores what it returns, unless out is null, as columns of a panel whose steps
// are rows
template <int N, typename T, typename F>
inline void to_panel(int64_t rows, uint32_t* out, int64_t width, F row) {
  if constexpr (sizeof(T) == 4) {
    for (int64_t r = 0; r < rows; ++r) {
      const floats<N> v = row(r);
      if (out) store_bits(out + r * width, v);
    }
  } else {
    for (int64_t r = 0; r < rows; r += 2) {
      const floats<N> first = row(r), second = r + 1 < rows ? row(r + 1) : floats<N>{};
      const auto words = pair<N>(first, second);
      if (out) store_bits(out + r / 2 * width, words);
    }
  }
}

template <typename T>
void mask_accumulate(const float* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols,
                     Affine affine, const T* source, int64_t source_ld, T* total, int64_t total_ld, uint32_t* a,
                     int64_t a_width, float* sum_d, float* sum_dx) {
  lines(cols, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
    const floats<N> shift = load<N>(affine.shift + c);
    MaskSums<N> sums;
    parts(rows, [&](int64_t first, int64_t count) {
      MaskSums<N> part;
      const auto row = [&](int64_t i) {
        const int64_t r = first + i;
        __builtin_prefetch(x + r * ld + c + 32, 0, 2);  // the next panel's
        if (total) __builtin_prefetch(source + r * source_ld + c + 32, 0, 2);
        const floats<N> centred = load<N>(x + r * ld + c) - mean;
        const floats<N> y = centred * scale + shift;
        if (grad) {
          const floats<N> d = select(y <= 0, floats<N>{}, load<N>(grad + r * grad_ld + c));
          part.add(d, centred);
          if (total) store<N>(total + r * total_ld + c, load<N>(source + r * source_ld + c) + scale * d);
        }
        return relu(y);
      };
      to_panel<N, T>(count, a ? a + first / kRowsPerStep<T> * a_width + c : nullptr, a_width, row);
      sums.add(part);
    });
    if (grad) sums.add_to(sum_d + c, sum_dx + c);
  });
}

template <typename T>
void finalise(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols, const float* mean,
              const float* p, const float* q, T* out, int64_t out_ld) {
  for (int64_t r = 0; r < rows; ++r, grad += grad_ld, x += ld, out += out_ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x + c) - load<N>(mean + c);
      store<N>(out + c, load<N>(grad + c) + (load<N>(p + c) + load<N>(q + c) * centred));
    });
  }
}

template <typename T>
void dropout(T* x, int64_t ld, const uint8_t* mask, int64_t mask_ld, int64_t rows, int64_t cols, float scale) {
  for (int64_t r = 0; r < rows; ++r, x += ld, mask += mask_ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> kept = __builtin_convertvector(load<N>(mask + c), floats<N>);
      store<N>(x + c, load<N>(x + c) * (kept * scale));
    });
  }
}

template <typename T>
void bn_relu_mean(const T* const* x, int64_t offset, int64_t rows, int64_t window, int64_t cols, Affine affine, T* out,
                  T* rest, int64_t out_ld) {
  const float factor = 1.0f / static_cast<float>(window);
  for (int64_t r = 0; r < rows; ++r, x += window, out += out_ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
      const floats<N> shift = load<N>(affine.shift + c);
      floats<N> sum = {};
      for (int64_t i = 0; i < window; ++i) sum += relu((load<N>(x[i] + offset + c) - mean) * scale + shift);
      store<N>(out + c, factor * sum);
      if (rest) store<N>(rest + c, factor * sum - load<N>(out + c));
    });
    if (rest) rest += out_ld;
  }
}

template <typename T>
void mask_windows(const float* grad, int64_t grad_ld, const T* const* x, int64_t offset, int64_t rows, int64_t window,
                  int64_t cols, Affine affine, T* const* out, uint32_t* a, int64_t a_width, float* sum_d,
                  float* sum_dx) {
  const float factor = 1.0f / static_cast<float>(window);
  lines(cols, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
    const floats<N> shift = load<N>(affine.shift + c);
    MaskSums<N> sums;
    parts(rows, [&](int64_t first, int64_t count) {
      MaskSums<N> part;
      const auto row = [&](int64_t j) {
        const int64_t r = first + j;
        const floats<N> share = grad ? factor * load<N>(grad + r * grad_ld + c) : floats<N>{};
        floats<N> mean_a = {};
        for (int64_t i = r * window; i < (r + 1) * window; ++i) {
          __builtin_prefetch(x[i] + offset + c + 32, 0, 2);  // the next panel's
          if (grad) __builtin_prefetch(out[i] + offset + c + 32, 1, 2);
          const floats<N> centred = load<N>(x[i] + offset + c) - mean;
          const floats<N> y = centred * scale + shift;
          mean_a += relu(y);
          if (!grad) continue;
          const floats<N> d = select(y <= 0, floats<N>{}, share);
          part.add(d, centred);
          store<N>(out[i] + offset + c, scale * d);
        }
        return factor * mean_a;
      };
      to_panel<N, T>(count, a ? a + first / kRowsPerStep<T> * a_width + c : nullptr, a_width, row);
      sums.add(part);
    });
    if (grad) sums.add_to(sum_d + c, sum_dx + c);
  });
}

template <typename T>
void mask(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out,
          int64_t out_ld, float* sum_d, float* sum_dx) {
  for (int64_t r = 0; r < rows; ++r, grad += grad_ld, x += ld, out += out_ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x + c) - load<N>(affine.mean + c);
      const floats<N> scale = load<N>(affine.scale + c);
      const floats<N> d = centred * scale + load<N>(affine.shift + c) <= 0 ? floats<N>{} : load<N>(grad + c);
      store<N>(sum_d + c, load<N>(sum_d + c) + d);
      store<N>(sum_dx + c, load<N>(sum_dx + c) + d * centred);
      store<N>(out + c, scale * d);
    });
  }
}

inline void fold(const float* var, float eps, const float* weight, int64_t cols, float* scale) {
  for (int64_t c = 0; c < cols; ++c) scale[c] = 1.0f / __builtin_sqrtf(var[c] + eps);
  for (int64_t c = 0; weight && c < cols; ++c) scale[c] *= weight[c];
}

template <typename T>
void add(const T* values, int64_t count, float* total) {
  columns(count, [&]<int N>(int64_t c) { store<N>(total + c, load<N>(total + c) + load<N>(values + c)); });
}

// out = values + bias (unless null), [rows, cols]
template <typename T>
void store_rows(const float* values, int64_t values_ld, int64_t rows, int64_t cols, const float* bias,
                const Affine* then, T* out, int64_t out_ld) {
  for (int64_t r = 0; r < rows; ++r, values += values_ld, out += out_ld) {
    columns(cols, [&]<int N>(int64_t c) {
      floats<N> v = load<N>(values + c);
      if (bias) v += load<N>(bias + c);
      if (then) v = relu((v - load<N>(then->mean + c)) * load<N>(then->scale + c) + load<N>(then->shift + c));
      store<N>(out + c, v);
    });
  }
}

}  // namespace
}  // namespace densenet_fast
