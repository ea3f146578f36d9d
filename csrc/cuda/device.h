// What differs between a GPU and the emulation that tests the kernels on CPUs: launches and shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include "recorder.h"

namespace densenet_fast::cuda {

__device__ inline void* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// What went wrong, or null; where there is a recorder, records instead
template <typename Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Params& params) {
  if (record(kernel, grid, block, shared_bytes, params)) return nullptr;
  if (shared_bytes > kSharedBytes) {
    const int most = static_cast<int>(shared_bytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace densenet_fast::cuda

#else
#include "emulator.h"
#endif
