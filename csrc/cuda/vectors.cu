// The small work on vectors and weights around the kernels of a pass, many jobs in one launch.
//
//   target = source in the target's type;   r = 1 / sqrt(v + eps);   target = 0
//   n += 1;   running = running + momentum * (batch - running), with the variance v * M / (M - 1)
#include "columns.h"

namespace densenet_fast::cuda {
namespace {

constexpr int kMostBlocks = 64;  // of a job

__device__ inline int64_t elements(const Job& job) {
  return static_cast<int64_t>(job.k) * job.columns * job.taps[0] * job.taps[1] * job.taps[2];
}

// Where element e of a target, in the order of its memory, stands in the source
__device__ inline int64_t source_of(const Job& job, int64_t e) {
  int64_t at = 0, column = 0, index;
  if (job.channels_last) e = divide(e, job.columns, column);
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    if (job.taps[d] == 1) continue;
    e = divide(e, job.taps[d], index);
    at += index * job.strides[2 + d];
  }
  if (!job.channels_last) e = divide(e, job.columns, column);
  return at + column * job.strides[1] + e * job.strides[0];
}

// A row of blocks for each job; adjacent threads write adjacent elements
template <typename To, typename From>
__device__ void copy(const Job& job) {
  const int64_t n = elements(job), step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < n; e += step)
    static_cast<To*>(job.target)[e] = convert<To>(static_cast<const From*>(job.source)[source_of(job, e)]);
}

template <typename To>
__device__ void make(const Job& job) {
  const int64_t n = elements(job), step = static_cast<int64_t>(gridDim.x) * kThreads;
  if (job.making == Making::copy) {
    if (job.source_type == Type::f32) return copy<To, float>(job);
    if (job.source_type == Type::f64) return copy<To, double>(job);
    if (job.source_type == Type::f16) return copy<To, f16>(job);
    return copy<To, bf16>(job);
  }
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < n; e += step) {
    To value = convert<To>(0.f);
    if constexpr (sizeof(To) >= sizeof(float)) {
      if (job.making == Making::rstd) {
        const To var = load<To>(job.source, job.source_type, source_of(job, e));
        value = 1 / sqrt(var + static_cast<To>(job.eps));
      }
    }
    static_cast<To*>(job.target)[e] = value;
  }
}

__global__ __launch_bounds__(kThreads, 2) void prepare_kernel(const __grid_constant__ Prepare p) {
  const Job& job = p.jobs[blockIdx.y];
  if (job.target_type == Type::f32) return make<float>(job);
  if (job.target_type == Type::f64) return make<double>(job);
  if (job.target_type == Type::f16) return make<f16>(job);
  make<bf16>(job);
}

// torch's, which is exact at both ends
template <typename A>
__device__ inline A lerp(A from, A to, A share) {
  const A difference = to - from;
  return share < A(0.5) && share > A(-0.5) ? from + share * difference : to - difference * (1 - share);
}

// A block for each normalisation
template <typename A>
__global__ __launch_bounds__(kThreads, 2) void update_running_kernel(const __grid_constant__ UpdateRunning p) {
  const Running& r = p.running[blockIdx.x];
  const Batch& batch = p.batches[r.batch];
  const double count = batch.count_tensor == nullptr ? batch.count : *batch.count_tensor;
  const A unbiased = static_cast<A>(count / (count - 1));
  A momentum = static_cast<A>(r.momentum);
  const int64_t batches = r.batches == nullptr ? 0 : *r.batches + 1;
  if (momentum != momentum) momentum = r.batches == nullptr ? A(0) : 1 / static_cast<A>(batches);
  __syncthreads();
  if (threadIdx.x == 0 && r.batches != nullptr) *r.batches = batches;
  for (int col = threadIdx.x; col < r.cols; col += kThreads) {
    const A mean = static_cast<const A*>(batch.mean)[r.start + col];
    const A var = static_cast<const A*>(batch.var)[r.start + col] * unbiased;
    store(r.mean, r.mean_type, col, lerp(load<A>(r.mean, r.mean_type, col), mean, momentum));
    store(r.var, r.var_type, col, lerp(load<A>(r.var, r.var_type, col), var, momentum));
  }
}

}  // namespace

const char* prepare(const Prepare& p, int count, void* stream) {
  int64_t most = 0;
  for (int i = 0; i < count; ++i) {
    const Job& job = p.jobs[i];
    const int64_t n = static_cast<int64_t>(job.k) * job.columns * job.taps[0] * job.taps[1] * job.taps[2];
    most = n > most ? n : most;
  }
  const int64_t blocks = (most + kUnroll * kThreads - 1) / (kUnroll * kThreads);
  return launch(prepare_kernel, dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), count),
                dim3(kThreads), 0, stream, p);
}

const char* update_running_statistics(const UpdateRunning& p, int count, Type type, void* stream) {
  return by_accumulation(
      type, [&]<typename A>(A) { return launch(update_running_kernel<A>, dim3(count), dim3(kThreads), 0, stream, p); });
}

}  // namespace densenet_fast::cuda
