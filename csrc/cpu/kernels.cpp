// The row-tile kernels, compiled once for each instruction set with TABLE set to its name. No header with inline code of
// others is included: such code would be compiled for this instruction set and might run on a processor without it.
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0)
#include "kernels.h"

namespace densenet_fast {
namespace {

// N lanes of each type
template <int N>
struct Lanes {
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef int32_t ints __attribute__((vector_size(N * 4)));
  typedef uint32_t words __attribute__((vector_size(N * 4)));
  typedef uint16_t halves __attribute__((vector_size(N * 2)));
};
template <int N>
using floats = typename Lanes<N>::floats;

template <int N>
inline floats<N> load(const float* p) {
  floats<N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
inline floats<N> load(const bf16* p) {
  typename Lanes<N>::halves bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  const typename Lanes<N>::words wide = __builtin_convertvector(bits, typename Lanes<N>::words) << 16;
  floats<N> v;
  __builtin_memcpy(&v, &wide, sizeof(v));
  return v;
}

template <int N>
inline void store(float* p, floats<N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <int N>
inline void store(bf16* p, floats<N> v) {  // to nearest, ties to even; NaN stays NaN
  typename Lanes<N>::words w;
  __builtin_memcpy(&w, &v, sizeof(w));
  const typename Lanes<N>::words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const typename Lanes<N>::ints is_nan = v != v;
  const typename Lanes<N>::words bits = is_nan ? typename Lanes<N>::words{} + 0x7fc0 : rounded;
  const typename Lanes<N>::halves narrow = __builtin_convertvector(bits, typename Lanes<N>::halves);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

template <typename V>
inline V relu(V v) {
  return v < 0 ? V{} : v;
}

// f<lanes>(column) over the columns of a row: sixteen at a time, the rest by eight, four and one
template <typename F>
inline void columns(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + 16 <= cols; c += 16) f.template operator()<16>(c);
  if (c + 8 <= cols) {
    f.template operator()<8>(c);
    c += 8;
  }
  if (c + 4 <= cols) {
    f.template operator()<4>(c);
    c += 4;
  }
  for (; c < cols; ++c) f.template operator()<1>(c);
}

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

#define STRING_(name) #name
#define STRING(name) STRING_(name)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern const KernelTable JOIN(table_, TABLE);
const KernelTable JOIN(table_, TABLE) = {STRING(TABLE), table<float>(), table<bf16>()};

}  // namespace densenet_fast
