// Running statistics, which a batch's statistics update.
//
//   running += momentum * (batch - running), with the variance v * count / (count - 1);   counters += 1
//
// Example:
//
//   const RunningStatistics running(tensors, {}, {0.1}, {0});  // of one normalisation
//   running.check(0, 1, 64);                                   // that it fits 64 packed columns, or an error
//   running.update(0, 1, floats_of(mean), floats_of(var), 256);
#pragma once

#include "matrices.h"

namespace densenet_fast {

struct RunningStatistics {
  std::vector<Tensor> vectors;   // of each normalisation its mean and its variance, by turns
  std::vector<Tensor> counters;  // of batches
  std::vector<double> momenta;
  std::vector<int64_t> starts;  // where each one's batch statistics stand in the packed ones

  RunningStatistics(std::vector<Tensor> vectors, std::vector<Tensor> counters, std::vector<double> momenta,
                    std::vector<int64_t> starts)
      : vectors(std::move(vectors)),
        counters(std::move(counters)),
        momenta(std::move(momenta)),
        starts(std::move(starts)) {
    STD_TORCH_CHECK(this->vectors.size() == 2 * this->momenta.size() && this->starts.size() == this->momenta.size(),
                    "vectors: expected two for each momentum and start, got ", this->vectors.size());
    for (const Tensor& counter : this->counters) {
      STD_TORCH_CHECK(counter.numel() == 1 && counter.scalar_type() == ScalarType::Long,
                      "counters: expected one int64 value each");
    }
  }

  // Raises an error unless normalisations [first, end) can be updated by so many packed statistics
  void check(size_t first, size_t end, int64_t packed) const {
    for (size_t i = 2 * first; i < 2 * end; ++i) {
      const int64_t cols = vectors[i].numel(), start = starts[i / 2];
      STD_TORCH_CHECK(0 <= start && start + cols <= packed, "vectors: expected at most ", packed - start, " values");
      vector(vectors[i], cols, "vectors");
    }
  }

  // By statistics over `count` rows
  void update(size_t first, size_t end, const float* mean, const float* var, double count) const {
    const float* batch[] = {mean, var};
    const float unbiased[] = {1.0f, static_cast<float>(count / (count - 1))};
    for (size_t i = 2 * first; i < 2 * end; ++i) {
      float* running = static_cast<float*>(vectors[i].data_ptr());
      const float *from = batch[i % 2] + starts[i / 2], factor = unbiased[i % 2];
      const float momentum = static_cast<float>(momenta[i / 2]);
      for (int64_t c = 0, cols = vectors[i].numel(); c < cols; ++c) {
        const float difference = from[c] * factor - running[c];
        running[c] = std::abs(momentum) < 0.5f ? running[c] + momentum * difference
                                               : from[c] * factor - difference * (1 - momentum);
      }
    }
  }

  void count_batch() const {
    for (const Tensor& counter : counters) ++*static_cast<int64_t*>(counter.data_ptr());
  }
};

}  // namespace densenet_fast
