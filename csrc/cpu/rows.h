// The kernels on row tiles that hold no product.
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0), and grad where y is NaN, as in stock's ReLU
//
// Example:
//
//   bn_relu<float>({x, 256}, 100, 64, {mean, scale, shift}, {out, 64});  // is Kernels<float>::bn_relu: see kernels.h
#pragma once

#include "vectors.h"

namespace densenet_fast {
namespace {

template <typename T>
inline Rows<T> from_row(Rows<T> rows, int64_t r) {
  return {rows.data + r * rows.ld, rows.ld};
}

// several rows at a time, so that a column's vectors are loaded once for all
template <int ROWS, typename T>
inline void bn_relu_rows(Rows<const T> x, int64_t cols, Affine affine, Rows<T> out, int64_t ahead) {
  columns(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    for (int i = 0; i < ROWS; ++i) {
      __builtin_prefetch(x.data + i * x.ld + ahead + c, 0, 2);
      store<N>(out.data + i * out.ld + c, relu(bn(load<N>(x.data + i * x.ld + c))));
    }
  });
}

template <typename T>
void bn_relu(Rows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out) {
  const int64_t next_tile = rows * x.ld;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) bn_relu_rows<4>(from_row(x, r), cols, affine, from_row(out, r), next_tile);
  for (; r < rows; ++r) bn_relu_rows<1>(from_row(x, r), cols, affine, from_row(out, r), next_tile);
}

// in double and by the distance from the first row, so that nothing is lost where a column is constant but for a few.
// A register holds half as many doubles as floats.
template <typename T>
void statistics(Rows<const T> x, int64_t rows, int64_t cols, double* mean, double* m2) {
  lines(cols, [&]<int N>(int64_t c) {
    constexpr int kDoubles = N < kLanes / 2 ? N : kLanes / 2, kVectors = N / kDoubles;
    Moments<kDoubles> moments[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) moments[i].first = moments[i].widen(load<kDoubles>(x.data + c + i * kDoubles));
    for (int64_t r = 1; r < rows; ++r) {
      const T* row = x.data + r * x.ld + c;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) moments[i].add(load<kDoubles>(row + i * kDoubles));
    }
    for (int i = 0; i < kVectors; ++i) moments[i].store(rows, mean + c + i * kDoubles, m2 + c + i * kDoubles);
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
void mask_accumulate(Rows<const float> grad, Rows<const T> x, int64_t rows, int64_t cols, Affine affine,
                     Accumulated<T> to, PanelRows a, GradientSums sums) {
  lines(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    MaskSums<N> own;
    parts(rows, [&](int64_t first, int64_t count) {
      MaskSums<N> part;
      const auto row = [&](int64_t i) {
        const int64_t r = first + i;
        __builtin_prefetch(x.data + r * x.ld + c + 32, 0, 2);  // the next panel's
        if (to.total.data) __builtin_prefetch(to.source.data + r * to.source.ld + c + 32, 0, 2);
        const floats<N> centred = load<N>(x.data + r * x.ld + c) - bn.mean;
        const floats<N> y = centred * bn.scale + bn.shift;
        if (grad.data) {
          const floats<N> d = select(y <= 0, floats<N>{}, load<N>(grad.data + r * grad.ld + c));
          part.add(d, centred);
          if (to.total.data)
            store<N>(to.total.data + r * to.total.ld + c,
                     load<N>(to.source.data + r * to.source.ld + c) + bn.scale * d);
        }
        return relu(y);
      };
      to_panel<N, T>(count, a.words ? a.words + first / kRowsPerStep<T> * a.width + c : nullptr, a.width, row);
      own.add(part);
    });
    if (grad.data) own.add_to(sums, c);
  });
}

template <typename T>
void finalise(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t cols, const float* mean, const float* p,
              const float* q, Rows<T> out) {
  for (int64_t r = 0; r < rows; ++r, grad.data += grad.ld, x.data += x.ld, out.data += out.ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x.data + c) - load<N>(mean + c);
      store<N>(out.data + c, load<N>(grad.data + c) + (load<N>(p + c) + load<N>(q + c) * centred));
    });
  }
}

template <typename T>
void dropout(Rows<T> x, Rows<const uint8_t> mask, int64_t rows, int64_t cols, float scale) {
  for (int64_t r = 0; r < rows; ++r, x.data += x.ld, mask.data += mask.ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> kept = __builtin_convertvector(load<N>(mask.data + c), floats<N>);
      store<N>(x.data + c, load<N>(x.data + c) * (kept * scale));
    });
  }
}

template <typename T>
void bn_relu_mean(WindowRows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out, T* rest) {
  const float factor = 1.0f / static_cast<float>(x.window);
  for (int64_t r = 0; r < rows; ++r, x.pointers += x.window, out.data += out.ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const AffineLanes<N> bn(affine, c);
      floats<N> sum = {};
      for (int64_t i = 0; i < x.window; ++i) {
        sum += relu(bn(load<N>(x.pointers[i] + x.offset + c)));
      }
      store<N>(out.data + c, factor * sum);
      if (rest) store<N>(rest + c, factor * sum - load<N>(out.data + c));
    });
    if (rest) rest += out.ld;
  }
}

template <typename T>
void mask_windows(Rows<const float> grad, WindowRows<const T> x, int64_t rows, int64_t cols, Affine affine,
                  T* const* out, PanelRows a, GradientSums sums) {
  const float factor = 1.0f / static_cast<float>(x.window);
  lines(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    MaskSums<N> own;
    parts(rows, [&](int64_t first, int64_t count) {
      MaskSums<N> part;
      const auto row = [&](int64_t j) {
        const int64_t r = first + j;
        const floats<N> share = grad.data ? factor * load<N>(grad.data + r * grad.ld + c) : floats<N>{};
        floats<N> mean_a = {};
        for (int64_t i = r * x.window; i < (r + 1) * x.window; ++i) {
          __builtin_prefetch(x.pointers[i] + x.offset + c + 32, 0, 2);  // the next panel's
          if (grad.data) __builtin_prefetch(out[i] + x.offset + c + 32, 1, 2);
          const floats<N> centred = load<N>(x.pointers[i] + x.offset + c) - bn.mean;
          const floats<N> y = centred * bn.scale + bn.shift;
          mean_a += relu(y);
          if (!grad.data) continue;
          const floats<N> d = select(y <= 0, floats<N>{}, share);
          part.add(d, centred);
          store<N>(out[i] + x.offset + c, bn.scale * d);
        }
        return factor * mean_a;
      };
      to_panel<N, T>(count, a.words ? a.words + first / kRowsPerStep<T> * a.width + c : nullptr, a.width, row);
      own.add(part);
    });
    if (grad.data) own.add_to(sums, c);
  });
}

template <typename T>
void mask(Rows<const T> grad, Rows<const T> x, int64_t rows, int64_t cols, Affine affine, Rows<T> out,
          GradientSums sums) {
  for (int64_t r = 0; r < rows; ++r, grad.data += grad.ld, x.data += x.ld, out.data += out.ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const AffineLanes<N> bn(affine, c);
      const floats<N> centred = load<N>(x.data + c) - bn.mean;
      const floats<N> d = centred * bn.scale + bn.shift <= 0 ? floats<N>{} : load<N>(grad.data + c);
      store<N>(sums.d + c, load<N>(sums.d + c) + d);
      store<N>(sums.dx + c, load<N>(sums.dx + c) + d * centred);
      store<N>(out.data + c, bn.scale * d);
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

template <typename T>
void store_rows(Rows<const float> values, int64_t rows, int64_t cols, const float* bias, const Affine* then,
                Rows<T> out) {
  for (int64_t r = 0; r < rows; ++r, values.data += values.ld, out.data += out.ld) {
    columns(cols, [&]<int N>(int64_t c) {
      floats<N> v = load<N>(values.data + c);
      if (bias) v += load<N>(bias + c);
      if (then) v = relu(AffineLanes<N>(*then, c)(v));
      store<N>(out.data + c, v);
    });
  }
}

}  // namespace
}  // namespace densenet_fast
