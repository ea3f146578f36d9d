// The instructions of compute capability 8.0 and up that products need: copies to shared memory that go on while a
// thread works, a warp's loads of 8x8 matrices, and its products. Places in shared memory are bytes from its start.
//
// A warp's fragments, for lane l with g = l / 4 and t = l % 4, each register two adjacent 16-bit values:
//
//   a [16, 16]   rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8
//   b [16, 8]    column g at rows 2t, 2t + 8
//   d [16, 8]    float: row g at columns 2t, 2t + 1, then row g + 8
//
// load_matrices gives lane l of the q-th of four matrices row g, columns 2t and 2t + 1; transposed, column g, rows 2t
// and 2t + 1. The rows' places, 16 bytes each, come from the lanes: those of matrix q from lanes 8q to 8q + 7.
#pragma once

#include <type_traits>

#include "columns.h"

#if defined(__CUDACC__)

namespace densenet_fast::cuda {

__device__ inline unsigned shared_address(unsigned place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory())) + place;
}

// 16 bytes: the first `bytes` of memory, zeros behind. Those that this thread copies between two calls of commit_copies
// are a group. What several blocks read may stay in the L1 cache.
template <bool CACHED>
__device__ inline void copy_async(unsigned place, const void* from, int bytes) {
  if constexpr (CACHED)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(place)), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(place)), "l"(from),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the last N are there, for this thread alone
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline void load_matrices(unsigned (&m)[4], unsigned place) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(place))
               : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&m)[4], unsigned place) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(place))
               : "memory");
}

// The sum over the lanes that hold the same columns of d
__device__ inline float sum_of_rows(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, lanes);
  return value;
}

// relu of two values, rounded; a NaN stays one
template <typename T>
__device__ inline unsigned relu_pair(float low, float high) {
  unsigned pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d += a @ b
template <typename T>
__device__ inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace densenet_fast::cuda

#else
#include "emulated_tensor_cores.h"
#endif
