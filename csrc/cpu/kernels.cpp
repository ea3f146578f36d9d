// The row-tile kernels, compiled once for each instruction set with TABLE set to its name. No header with inline code of
// others is included: such code would be compiled for this instruction set and might run on a processor without it.
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0)
#include "kernels.h"

namespace densenet_fast {
namespace {

constexpr int64_t kLanes = 16;
typedef float floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2)));

// `n` is kLanes in the body of a row and the remainder in its tail; lanes past n are zero
template <typename V, typename T>
inline V load_raw(const T* p, int64_t n) {
  V v = {};
  if (n == kLanes) {
    __builtin_memcpy(&v, p, sizeof(V));
  } else {
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  }
  return v;
}

inline floats load(const float* p, int64_t n) { return load_raw<floats>(p, n); }

inline floats load(const bf16* p, int64_t n) {
  const halves bits = load_raw<halves>(reinterpret_cast<const uint16_t*>(p), n);
  const words wide = __builtin_convertvector(bits, words) << 16;
  floats v;
  __builtin_memcpy(&v, &wide, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store_raw(T* p, V v, int64_t n) {
  if (n == kLanes) {
    __builtin_memcpy(p, &v, sizeof(V));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
}

inline void store(float* p, floats v, int64_t n) { store_raw(p, v, n); }

inline void store(bf16* p, floats v, int64_t n) {  // to nearest, ties to even; NaN stays NaN
  words w;
  __builtin_memcpy(&w, &v, sizeof(w));
  const words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const ints is_nan = v != v;
  const words bits = is_nan ? words{} + 0x7fc0 : rounded;
  store_raw(reinterpret_cast<uint16_t*>(p), __builtin_convertvector(bits, halves), n);
}

inline floats relu(floats v) { return v < 0 ? floats{} : v; }

// f(column, lanes) over the columns of a row
template <typename F>
inline void columns(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) f(c, kLanes);
  if (c < cols) f(c, cols - c);
}

template <typename T>
void bn_relu(const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* out) {
  for (int64_t r = 0; r < rows; ++r, x += ld, out += cols) {
    columns(cols, [&](int64_t c, int64_t n) {
      const floats centred = load(x + c, n) - load(affine.mean + c, n);
      store(out + c, relu(centred * load(affine.scale + c, n) + load(affine.shift + c, n)), n);
    });
  }
}

// the corrected two-pass formula: `correction` is the mean of the residuals, zero but for rounding
template <typename T>
void statistics(const T* x, int64_t ld, int64_t rows, int64_t cols, float* mean, float* m2) {
  columns(cols, [&](int64_t c, int64_t n) {
    const floats count = floats{} + static_cast<float>(rows);
    floats sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(x + r * ld + c, n);
    const floats centre = sum / count;
    floats squares = {}, residuals = {};
    for (int64_t r = 0; r < rows; ++r) {
      const floats d = load(x + r * ld + c, n) - centre;
      residuals += d;
      squares += d * d;
    }
    store(mean + c, centre + residuals / count, n);
    const floats centred = squares - residuals * residuals / count;
    store(m2 + c, relu(centred), n);
  });
}

template <typename T>
void mask_accumulate(const T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, T* total,
                     int64_t total_ld, T* a, float* sum_d, float* sum_dx) {
  for (int64_t r = 0; r < rows; ++r, grad += cols, x += ld) {
    columns(cols, [&](int64_t c, int64_t n) {
      const floats centred = load(x + c, n) - load(affine.mean + c, n);
      const floats scale = load(affine.scale + c, n);
      const floats y = centred * scale + load(affine.shift + c, n);
      const floats d = y > 0 ? load(grad + c, n) : floats{};
      store(sum_d + c, load(sum_d + c, n) + d, n);
      store(sum_dx + c, load(sum_dx + c, n) + d * centred, n);
      if (total) store(total + c, load(total + c, n) + scale * d, n);
      if (a) store(a + c, relu(y), n);
    });
    if (total) total += total_ld;
    if (a) a += cols;
  }
}

template <typename T>
void mask(T* grad, const T* x, int64_t ld, int64_t rows, int64_t cols, Affine affine, float* sum_d, float* sum_dx) {
  for (int64_t r = 0; r < rows; ++r, grad += cols, x += ld) {
    columns(cols, [&](int64_t c, int64_t n) {
      const floats centred = load(x + c, n) - load(affine.mean + c, n);
      const floats scale = load(affine.scale + c, n);
      const floats d = centred * scale + load(affine.shift + c, n) > 0 ? load(grad + c, n) : floats{};
      store(sum_d + c, load(sum_d + c, n) + d, n);
      store(sum_dx + c, load(sum_dx + c, n) + d * centred, n);
      store(grad + c, scale * d, n);
    });
  }
}

template <typename T>
void finalise(const T* grad, int64_t grad_ld, const T* x, int64_t ld, int64_t rows, int64_t cols, const float* mean,
              const float* p, const float* q, T* out) {
  for (int64_t r = 0; r < rows; ++r, grad += grad_ld, x += ld, out += cols) {
    columns(cols, [&](int64_t c, int64_t n) {
      const floats centred = load(x + c, n) - load(mean + c, n);
      store(out + c, load(grad + c, n) + (load(p + c, n) + load(q + c, n) * centred), n);
    });
  }
}

template <typename T>
void add(const T* values, int64_t count, float* total) {
  columns(count, [&](int64_t c, int64_t n) { store(total + c, load(total + c, n) + load(values + c, n), n); });
}

template <typename T>
constexpr Kernels<T> table() {
  return {bn_relu<T>, statistics<T>, mask<T>, mask_accumulate<T>, finalise<T>, add<T>};
}

}  // namespace

#define STRING_(name) #name
#define STRING(name) STRING_(name)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern const KernelTable JOIN(table_, TABLE);
const KernelTable JOIN(table_, TABLE) = {STRING(TABLE), table<float>(), table<bf16>()};

}  // namespace densenet_fast
