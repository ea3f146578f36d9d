// Vectors of floats, and loads and stores between them and float32 or bfloat16, for the sources that are compiled once
// per instruction set. Such a source includes no header with inline code of others: it would be compiled for this
// instruction set and might run on a processor without it.
//
// Example:
//
//   // out [100] = relu(x): a register at a time, and the rest by eight, four and one
//   columns(100, [&]<int N>(int64_t c) { store<N>(out + c, relu(load<N>(x + c))); });
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define STRING_(name) #name
#define STRING(name) STRING_(name)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace densenet_fast {
namespace {

// Of a register. GCC makes scalar instructions of comparisons between wider vectors.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Registers that are used as one vector
template <typename V>
struct Wide {
  V low, high;

  friend Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
  friend Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
  friend Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
  friend Wide operator*(float a, Wide b) { return {a * b.low, a * b.high}; }
  friend Wide operator/(Wide a, float b) { return {a.low / b, a.high / b}; }
  friend Wide& operator+=(Wide& a, Wide b) { return a = a + b; }
  friend auto operator<=(Wide a, float b) { return Wide<decltype(a.low <= b)>{a.low <= b, a.high <= b}; }
};

// N lanes of each type
template <int N>
struct Lanes {
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef double doubles __attribute__((vector_size(N * 8)));
  typedef int32_t ints __attribute__((vector_size(N * 4)));
  typedef uint32_t words __attribute__((vector_size(N * 4)));
  typedef uint16_t halves __attribute__((vector_size(N * 2)));
  typedef uint8_t bytes __attribute__((vector_size(N)));
};
template <int N>
  requires(N > kLanes)
struct Lanes<N> {
  using floats = Wide<typename Lanes<N / 2>::floats>;
  using words = Wide<typename Lanes<N / 2>::words>;
};
template <int N>
using floats = typename Lanes<N>::floats;
template <int N>
using ints = typename Lanes<N>::ints;

template <int N>
inline floats<N> load(const float* p) {
  if constexpr (N > kLanes) {
    return {load<N / 2>(p), load<N / 2>(p + N / 2)};
  } else {
    floats<N> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}

// In intrinsics where GCC makes several instructions of the portable form
template <int N>
inline floats<N> load(const bf16* p) {
  if constexpr (N > kLanes) {
    return {load<N / 2>(p), load<N / 2>(p + N / 2)};
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      return (floats<N>)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(-1, bits), 16);
    }
#endif
    typename Lanes<N>::halves bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    const typename Lanes<N>::words wide = __builtin_convertvector(bits, typename Lanes<N>::words) << 16;
    floats<N> v;
    __builtin_memcpy(&v, &wide, sizeof(v));
    return v;
  }
}

// p's four bytes a lane = v's bits
template <typename P, typename V>
inline void store_bits(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename P, typename V>
inline void store_bits(P* p, Wide<V> v) {
  store_bits(p, v.low);
  store_bits(p + sizeof(V) / sizeof(P), v.high);
}

template <int N>
inline void store(float* p, floats<N> v) {
  store_bits(p, v);
}

// the bits of v as bf16, in the low half of each word: to nearest, ties to even; NaN stays NaN
template <int N>
inline typename Lanes<N>::words round_bits(floats<N> v) {
  typename Lanes<N>::words w;
  __builtin_memcpy(&w, &v, sizeof(w));
  const typename Lanes<N>::words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  const typename Lanes<N>::ints is_nan = v != v;
  return is_nan ? typename Lanes<N>::words{} + 0x7fc0 : rounded;
}

template <int N>
inline void store(bf16* p, floats<N> v) {
  if constexpr (N > kLanes) {
    store<N / 2>(p, v.low);
    store<N / 2>(p + N / 2, v.high);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (N == 16) {
      const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
      __builtin_memcpy(p, &narrow, sizeof(narrow));
      return;
    }
#endif
    const typename Lanes<N>::halves narrow = __builtin_convertvector(round_bits<N>(v), typename Lanes<N>::halves);
    __builtin_memcpy(p, &narrow, sizeof(narrow));
  }
}

// words of two bf16, of `low` and of `high`
template <int N>
inline typename Lanes<N>::words pair(floats<N> low, floats<N> high) {
  if constexpr (N > kLanes) {
    return {pair<N / 2>(low.low, high.low), pair<N / 2>(low.high, high.high)};
  } else {
#if defined(__AVX512BF16__)
    if constexpr (N == 16) {
      alignas(64) static constexpr uint16_t interleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                               21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                               11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      return (typename Lanes<N>::words)_mm512_permutexvar_epi16(_mm512_load_si512(interleaved), both);
    }
#endif
    return round_bits<N>(low) | round_bits<N>(high) << 16;
  }
}

// Bytes become words and back by way of halves: GCC converts a vector in one instruction between neighbouring widths
// alone.
template <int N>
inline ints<N> load(const uint8_t* p) {
  typename Lanes<N>::bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<N>::halves), ints<N>);
}

template <int N>
inline void store(uint8_t* p, ints<N> v) {
  const typename Lanes<N>::halves halves = __builtin_convertvector(v, typename Lanes<N>::halves);
  const typename Lanes<N>::bytes narrow = __builtin_convertvector(halves, typename Lanes<N>::bytes);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

// NaN stays NaN: the maximum instruction returns its second operand there
template <typename V>
inline V relu(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#endif
  return v < 0 ? V{} : v;
}

template <typename V>
inline Wide<V> relu(Wide<V> v) {
  return {relu(v.low), relu(v.high)};
}

// a where `condition` holds, and else b
template <typename C, typename V>
inline V select(C condition, V a, V b) {
  return condition ? a : b;
}

template <typename C, typename V>
inline Wide<V> select(Wide<C> condition, Wide<V> a, Wide<V> b) {
  return {select(condition.low, a.low, b.low), select(condition.high, a.high, b.high)};
}

// Of each lane's values, the sums of their distances from a first one and of the squares of these
template <int N>
struct Moments {
  using doubles = typename Lanes<N>::doubles;
  doubles first, sum = {}, squares = {};

  static doubles widen(floats<N> v) {
#if defined(__AVX512F__)
    if constexpr (N == 8) return (doubles)_mm512_cvtps_pd((__m256)v);
#endif
    return __builtin_convertvector(v, doubles);
  }

  void add(floats<N> v) {
    const doubles distance = widen(v) - first;
    sum += distance;
    squares += distance * distance;
  }

  // the mean and the sum of squared distances from it
  void store(double count, double* mean, double* m2) const {
    const doubles shift = sum / count, rest = squares - sum * shift;
    store_bits(mean, first + shift);
    store_bits(m2, rest);
    for (int i = 0; i < N; ++i) m2[i] = m2[i] < 0 ? 0 : m2[i];  // NaN stays NaN
  }
};

// N columns' affine, y = (x - mean) * scale + shift
template <int N>
struct AffineLanes {
  floats<N> mean, scale, shift;

  AffineLanes(const Affine& affine, int64_t c)
      : mean(load<N>(affine.mean + c)), scale(load<N>(affine.scale + c)), shift(load<N>(affine.shift + c)) {}

  floats<N> operator()(floats<N> x) const { return (x - mean) * scale + shift; }
};

// f(first row, rows) for the parts of a tile that are summed by themselves, so that rounding does not grow with its
// rows
template <typename F>
inline void parts(int64_t rows, F f) {
  constexpr int64_t kRows = 16;
  for (int64_t r = 0; r < rows; r += kRows) f(r, rows - r < kRows ? rows - r : kRows);
}

// sum D and sum D * (x - mean) of N columns
template <int N>
struct MaskSums {
  floats<N> d = {}, dx = {};

  void add(floats<N> masked, floats<N> centred) {
    d += masked;
    dx += masked * centred;
  }
  void add(const MaskSums& part) {
    d += part.d;
    dx += part.dx;
  }
  void add_to(GradientSums sums, int64_t c) const {
    store<N>(sums.d + c, load<N>(sums.d + c) + d);
    store<N>(sums.dx + c, load<N>(sums.dx + c) + dx);
  }
};

// f<lanes>(column) over the columns of a row: WIDEST at a time, by default a register's, and the rest by eight, four
// and one
template <int WIDEST = kLanes, typename F>
inline void columns(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + WIDEST <= cols; c += WIDEST) f.template operator()<WIDEST>(c);
  if constexpr (WIDEST > 8) {
    if (c + 8 <= cols) {
      f.template operator()<8>(c);
      c += 8;
    }
  }
  if constexpr (WIDEST > 4) {
    if (c + 4 <= cols) {
      f.template operator()<4>(c);
      c += 4;
    }
  }
  for (; c < cols; ++c) f.template operator()<1>(c);
}

// The same for f that goes down the rows: sixteen at a time, a line of the cache of float32
template <typename F>
inline void lines(int64_t cols, F f) {
  columns<16>(cols, f);
}

}  // namespace
}  // namespace densenet_fast
