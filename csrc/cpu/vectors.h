// Vectors of floats, and loads and stores between them and float32 or bfloat16. Internal to each file that includes it, which
// is compiled for one instruction set.
#pragma once

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
  const typename Lanes<N>::halves narrow = __builtin_convertvector(round_bits<N>(v), typename Lanes<N>::halves);
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
