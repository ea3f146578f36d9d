// Vectors of N lanes for the sources that are compiled once per instruction set. Such a source includes no header with
// inline code of others: it would be compiled for this instruction set and might run on a processor without it.
#pragma once

#include "kernels.h"

#define STRING_(name) #name
#define STRING(name) STRING_(name)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace densenet_fast {
namespace {

// N lanes of each type
template <int N>
struct Lanes {
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef int32_t ints __attribute__((vector_size(N * 4)));
  typedef uint32_t words __attribute__((vector_size(N * 4)));
  typedef uint16_t halves __attribute__((vector_size(N * 2)));
  typedef uint8_t bytes __attribute__((vector_size(N)));
};
template <int N>
using floats = typename Lanes<N>::floats;
template <int N>
using ints = typename Lanes<N>::ints;

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

// Bytes become words and back by way of halves: GCC converts a vector in one instruction between neighbouring widths alone.
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

}  // namespace
}  // namespace densenet_fast
