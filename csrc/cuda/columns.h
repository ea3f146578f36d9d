// What the kernels share: a lane's adjacent columns, the affine of columns, sums and moments of a block's lanes.
//
// Lane (x, y) of a block owns `width` adjacent columns and reads rows y, y + Y, ... of the block's tile. Partial
// results are combined in a fixed order: a lane's rows, the lanes of a block, the tiles. Same inputs, bitwise same
// results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"
#include "kernels.h"

namespace densenet_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using Accumulated = typename Accumulation<T>::type;

template <int BYTES>
struct Bits;
template <>
struct Bits<16> {
  using type = uint4;
};
template <>
struct Bits<8> {
  using type = uint2;
};
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<1> {
  using type = unsigned char;
};

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(f16 v) { return __half2float(v); }
__device__ inline float widen(bf16 v) { return __bfloat162float(v); }
__device__ inline int widen(unsigned char v) { return v; }

template <typename T>
__device__ inline T narrow(Accumulated<T> v) {
  return v;
}
template <>
__device__ inline f16 narrow<f16>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline bf16 narrow<bf16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename To, typename From>
__device__ inline To convert(From v) {
  return narrow<To>(static_cast<Accumulated<To>>(widen(v)));
}

// vector[i] = v, in the vector's type
template <typename A>
__device__ inline void store(void* vector, Type type, int64_t i, A v) {
  if (type == Type::f32) static_cast<float*>(vector)[i] = convert<float>(v);
  if (type == Type::f64) static_cast<double*>(vector)[i] = convert<double>(v);
  if (type == Type::f16) static_cast<f16*>(vector)[i] = convert<f16>(v);
  if (type == Type::bf16) static_cast<bf16*>(vector)[i] = convert<bf16>(v);
}

// vector[i] in A
template <typename A>
__device__ inline A load(const void* vector, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<A>(static_cast<const float*>(vector)[i]);
  if (type == Type::f64) return static_cast<A>(static_cast<const double*>(vector)[i]);
  if (type == Type::f16) return static_cast<A>(widen(static_cast<const f16*>(vector)[i]));
  return static_cast<A>(widen(static_cast<const bf16*>(vector)[i]));
}

// Adjacent values as memory holds them; beyond the first `valid` (at least 1), zeros that are neither read nor written
template <typename T, int V>
struct Pack {
  T values[V];

  __device__ void load(const T* from, int valid) {
    using Word = typename Bits<sizeof(T) * V>::type;
    if (valid >= V) {
      const Word word = *reinterpret_cast<const Word*>(from);
      __builtin_memcpy(static_cast<void*>(values), &word, sizeof(word));
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = i < valid ? from[i] : T();
    }
  }

  __device__ void store(T* to, int valid) const {
    using Word = typename Bits<sizeof(T) * V>::type;
    if (valid >= V) {
      Word word;
      __builtin_memcpy(&word, values, sizeof(word));
      *reinterpret_cast<Word*>(to) = word;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (i < valid) to[i] = values[i];
    }
  }
};

template <typename T>
__device__ inline T* row(const Matrix& m, int64_t r, int64_t col) {
  return static_cast<T*>(m.data) + r * m.ld + col;
}

// a = quotient * divisor + remainder; 32-bit where that suffices, which is several times faster
__device__ inline int64_t divide(int64_t a, int64_t divisor, int64_t& remainder) {
  int64_t quotient;
  if ((a | divisor) >> 32 == 0) {
    quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(divisor);
  } else {
    quotient = a / divisor;
  }
  remainder = a - quotient * divisor;
  return quotient;
}

// Elements from the first row to row r
__device__ inline int64_t offset(const Strided& s, int64_t r) {
  int64_t elements = 0;
#pragma unroll
  for (int d = 3; d > 0; --d) {
    if (d >= s.dims) continue;
    int64_t index;
    r = divide(r, s.sizes[d], index);
    elements += index * s.strides[d];
  }
  return elements + r * s.strides[0];
}

// Where a thread works: its columns, and the rows of its block's tile
struct Place {
  int x, y, lanes;      // lane, and lanes along y
  int64_t tile, col;    // the first of its columns
  int valid;            // columns from there on that there are, not more than its width; not positive for an idle lane
  int64_t first, last;  // rows

  __device__ Place(const Tiling& t, int64_t rows, int64_t cols, int width)
      : x(threadIdx.x), y(threadIdx.y), lanes(t.y), tile(blockIdx.x) {
    col = (static_cast<int64_t>(blockIdx.y) * t.x + x) * width;
    valid = cols - col < width ? static_cast<int>(cols - col) : width;
    first = tile * t.tile_rows;
    last = first + t.tile_rows < rows ? first + t.tile_rows : rows;
  }

  // Its rows among the kUnroll that start with row r; r goes from first + y on by stride()
  __device__ int rows_from(int64_t r) const {
    int n = 0;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) n += r + i * lanes < last;
    return n;
  }
  __device__ int64_t stride() const { return static_cast<int64_t>(kUnroll) * lanes; }
};

// Element i of a vector of T, if it is narrow, or of T's accumulation type
template <typename T>
__device__ inline Accumulated<T> element(const void* vector, bool is_narrow, int64_t i) {
  return is_narrow ? widen(static_cast<const T*>(vector)[i]) : static_cast<const Accumulated<T>*>(vector)[i];
}

template <typename T>
__device__ inline Accumulated<T> scale_of(const Affine& affine, int64_t col) {
  const Accumulated<T> rstd = static_cast<const Accumulated<T>*>(affine.rstd)[col];
  return affine.weight == nullptr ? rstd : element<T>(affine.weight, affine.narrow_weight, col) * rstd;
}

// One column's affine: y = (x - mean) * scale + bias
template <typename A>
struct AffineColumn {
  A mean, scale, bias;

  __device__ A operator()(A x) const { return (x - mean) * scale + bias; }
};

// A lane's columns, of a matrix of T
template <typename T, int V, typename A = Accumulated<T>>
__device__ inline void load_affine(AffineColumn<A> (&columns)[V], const Affine& affine, const Place& at) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < at.valid) {
      const int64_t col = at.col + i;
      columns[i] = {static_cast<const A*>(affine.mean)[col], scale_of<T>(affine, col),
                    element<T>(affine.bias, affine.narrow_bias, col)};
    }
}

// relu as stock's: a NaN stays one
template <typename A>
__device__ inline A relu(A y) {
  return y <= 0 ? A(0) : y;
}

template <typename A>
struct Pair {
  A first = 0, second = 0;

  __device__ void add(const Pair& other) {
    first += other.first;
    second += other.second;
  }
  __device__ Pair partial() const { return *this; }
};

// Count, mean and centred second moment of some values
template <typename A>
struct Moments {
  A count = 0, mean = 0, m2 = 0;

  // Welford's update; `share` is 1 / (count + 1)
  __device__ void add(A value, A share) {
    count += 1;
    const A delta = value - mean;
    mean += delta * share;
    m2 += delta * (value - mean);
  }

  // Chan, Golub and LeVeque's
  __device__ void add(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const A total = count + other.count, share = other.count / total, delta = other.mean - mean;
    mean += delta * share;
    m2 += other.m2 + delta * delta * (count * share);
    count = total;
  }
  __device__ Pair<A> partial() const { return {mean, m2}; }
};

// One more row of a lane's columns
template <typename T, int V, typename A>
__device__ inline void add_row(Moments<A> (&moments)[V], const Pack<T, V>& row, int valid) {
  const A share = 1 / (moments[0].count + 1);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < valid) moments[i].add(widen(row.values[i]), share);
}

// Combines what the lanes of a block hold for their columns into those of lane y = 0, halving the lanes step by step; S
// is Moments or Pair. `memory` has room for every thread's.
template <typename S, int V>
__device__ inline void combine_lanes(S (&sums)[V], S* memory, int x, int y, int x_lanes, int y_lanes) {
  for (int n = y_lanes; n > 1;) {
    const int half = (n + 1) / 2;
    __syncthreads();
    if (y >= half && y < n) {
#pragma unroll
      for (int i = 0; i < V; ++i) memory[(i * y_lanes + y) * x_lanes + x] = sums[i];
    }
    __syncthreads();
    if (y + half < n) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i].add(memory[(i * y_lanes + y + half) * x_lanes + x]);
    }
    n = half;
  }
}

// What the lanes of a block hold for their columns, combined, into partials [tiles, 2, cols]
template <typename A, int V, typename S>
__device__ inline void store_partials(S (&sums)[V], void* partials, const Place& at, const Tiling& t, int64_t cols) {
  combine_lanes(sums, static_cast<S*>(shared_memory()), at.x, at.y, t.x, t.y);
  if (at.y > 0) return;
  A* first = static_cast<A*>(partials) + at.tile * 2 * cols + at.col;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < at.valid) {
      const Pair<A> partial = sums[i].partial();
      first[i] = partial.first;
      first[cols + i] = partial.second;
    }
}

// Shared memory in which combine_lanes combines `width` columns a lane
template <typename S>
size_t combining_bytes(const Tiling& t, int width) {
  return static_cast<size_t>(t.x) * t.y * width * sizeof(S);
}

// What `tiles` tiles left for a column, combined in order for the first of a block's 32 lanes of 8 columns; read(tile)
// returns S
constexpr int kCombineColumns = 8, kCombineLanes = 32;

template <typename S, typename Read>
__device__ inline S combine_tiles(int64_t tiles, Read read) {
  S sum[1];
  for (int64_t t = threadIdx.y; t < tiles; t += kCombineLanes) sum[0].add(read(t));
  combine_lanes(sum, static_cast<S*>(shared_memory()), threadIdx.x, threadIdx.y, kCombineColumns, kCombineLanes);
  return sum[0];
}

// Calls f(T())
template <typename F>
const char* by_type(Type type, F f) {
  switch (type) {
    case Type::f32:
      return f(float());
    case Type::f64:
      return f(double());
    case Type::f16:
      return f(f16());
    default:
      return f(bf16());
  }
}

// Calls f(T(), Width<V>()) for the type and the width: 16 bytes, 8, or one element
template <int V>
struct Width {};

template <typename T, typename F>
const char* by_width(int width, F f) {
  constexpr int kWhole = 16 / sizeof(T), kHalf = 8 / sizeof(T);
  if (width == kWhole) return f(T(), Width<kWhole>());
  if constexpr (kHalf > 1) {
    if (width == kHalf) return f(T(), Width<kHalf>());
  }
  return f(T(), Width<1>());
}

template <typename F>
const char* by_type(Type type, int width, F f) {
  return by_type(type, [&]<typename T>(T) { return by_width<T>(width, f); });
}

template <typename F>
const char* by_accumulation(Type type, F f) {
  return type == Type::f64 ? f(double()) : f(float());
}

inline dim3 blocks(const Tiling& t) { return dim3(static_cast<unsigned>(t.tiles), t.column_blocks); }
inline dim3 threads(const Tiling& t) { return dim3(t.x, t.y); }
inline dim3 combining_blocks(int64_t cols) {
  return dim3(static_cast<unsigned>((cols + kCombineColumns - 1) / kCombineColumns));
}

}  // namespace densenet_fast::cuda
