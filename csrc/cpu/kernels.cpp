// The row-tile kernels, compiled once for each instruction set with TABLE set to its name (see lanes.h).
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0)
#include "kernels.h"
#include "lanes.h"

namespace densenet_fast {
namespace {

template <typename T>
void bn_relu(const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out) {
  for (int64_t r = 0; r < rows; ++r, x += ld, out += cols) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x + c) - load<N>(affine.mean + c);
      store<N>(out + c, relu(centred * load<N>(affine.scale + c) + load<N>(affine.shift + c)));
    });
  }
}

// the corrected two-pass formula: the residuals' mean is zero but for rounding, and corrects both results
template <typename T>
void statistics(const T* x, int64_t ld, int64_t rows, int64_t cols, float* mean, float* m2) {
  columns(cols, [&]<int N>(int64_t c) {
    const float count = static_cast<float>(rows);
    floats<N> sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load<N>(x + r * ld + c);
    const floats<N> centre = sum / count;
    floats<N> squares = {}, residuals = {};
    for (int64_t r = 0; r < rows; ++r) {
      const floats<N> d = load<N>(x + r * ld + c) - centre;
      residuals += d;
      squares += d * d;
    }
    store<N>(mean + c, centre + residuals / count);
    store<N>(m2 + c, relu(squares - residuals * residuals / count));
  });
}

template <typename T>
void mask_accumulate(const T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* total,
                     int64_t total_ld, T* a, float* sum_d, float* sum_dx) {
  for (int64_t r = 0; r < rows; ++r, grad += cols, x += ld) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x + c) - load<N>(affine.mean + c);
      const floats<N> scale = load<N>(affine.scale + c);
      const floats<N> y = centred * scale + load<N>(affine.shift + c);
      const floats<N> d = y > 0 ? load<N>(grad + c) : floats<N>{};
      store<N>(sum_d + c, load<N>(sum_d + c) + d);
      store<N>(sum_dx + c, load<N>(sum_dx + c) + d * centred);
      if (total) store<N>(total + c, load<N>(total + c) + scale * d);
      if (a) store<N>(a + c, relu(y));
    });
    if (total) total += total_ld;
    if (a) a += cols;
  }
}

template <typename T>
void finalise(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols, const float* mean,
              const float* p, const float* q, T* out) {
  for (int64_t r = 0; r < rows; ++r, grad += grad_ld, x += ld, out += cols) {
    columns(cols, [&]<int N>(int64_t c) {
      const floats<N> centred = load<N>(x + c) - load<N>(mean + c);
      store<N>(out + c, load<N>(grad + c) + (load<N>(p + c) + load<N>(q + c) * centred));
    });
  }
}

template <typename T>
void bn_relu_sum(const T* const* rows, int64_t count, int64_t cols, Affine affine, float factor, T* out) {
  columns(cols, [&]<int N>(int64_t c) {
    const floats<N> mean = load<N>(affine.mean + c), scale = load<N>(affine.scale + c);
    const floats<N> shift = load<N>(affine.shift + c);
    floats<N> sum = {};
    for (int64_t i = 0; i < count; ++i) sum += relu((load<N>(rows[i] + c) - mean) * scale + shift);
    store<N>(out + c, factor * sum);
  });
}

template <typename T>
void mask_row(const T* grad, const T* x, int64_t cols, Affine affine, float factor, T* out, float* sum_d,
              float* sum_dx) {
  columns(cols, [&]<int N>(int64_t c) {
    const floats<N> centred = load<N>(x + c) - load<N>(affine.mean + c);
    const floats<N> scale = load<N>(affine.scale + c);
    const floats<N> y = centred * scale + load<N>(affine.shift + c);
    const floats<N> d = y > 0 ? factor * load<N>(grad + c) : floats<N>{};
    store<N>(sum_d + c, load<N>(sum_d + c) + d);
    store<N>(sum_dx + c, load<N>(sum_dx + c) + d * centred);
    store<N>(out + c, scale * d);
  });
}

template <typename T>
void mask(T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, float* sum_d, float* sum_dx) {
  for (int64_t r = 0; r < rows; ++r, grad += cols, x += ld) {
    mask_row(grad, x, cols, affine, 1.0f, grad, sum_d, sum_dx);
  }
}

template <typename T>
void add(const T* values, int64_t count, float* total) {
  columns(count, [&]<int N>(int64_t c) { store<N>(total + c, load<N>(total + c) + load<N>(values + c)); });
}

template <typename T>
constexpr Kernels<T> table() {
  return {bn_relu<T>, statistics<T>, mask<T>, mask_accumulate<T>, finalise<T>, bn_relu_sum<T>, mask_row<T>, add<T>};
}

}  // namespace

extern const KernelTable JOIN(table_, TABLE);
const KernelTable JOIN(table_, TABLE) = {STRING(TABLE), table<float>(), table<bf16>()};

}  // namespace densenet_fast
