// The 3x3 kernels of csrc/cuda beside plain loops, on a small problem: what a mutation of their source changes.
//
// `run` launches one instance of a kernel. A line for each of its results: "ran" or "error", and the largest deviation
// from the loops, by the largest value; NaN where something was not written.
#pragma once

#include <algorithm>
#include <cstdio>
#include <random>

namespace densenet_fast::cuda {

constexpr int kImages = 5, kHeight = 9, kWidth = 7, kRows = kImages * kHeight * kWidth;
constexpr int kB = 40, kK = 12;  // three planes, the last half full; and a part of one

inline float rounded(float v) { return widen(narrow<bf16>(v)); }

struct Problem {
  std::vector<bf16> z, grad, weight;
  std::vector<float> mean, scale, bias, p, q;

  Problem() : z(kRows * kB), grad(kRows * kK), weight(kK * 9 * kB), mean(kB), scale(kB), bias(kB), p(kB), q(kB) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (auto* values : {&z, &grad, &weight})
      for (bf16& v : *values) v = narrow<bf16>(normal(random));
    for (auto* values : {&mean, &scale, &bias, &p, &q})
      for (float& v : *values) v = normal(random);
  }

  Affine affine() const { return {mean.data(), scale.data(), bias.data(), nullptr, false, false}; }
  float normalised(int row, int b) const { return (widen(z[row * kB + b]) - mean[b]) * scale[b] + bias[b]; }
  float a(int row, int b) const { return rounded(std::max(normalised(row, b), 0.0f)); }
  float w(int j, int tap, int b) const { return widen(weight[(j * 9 + tap) * kB + b]); }
  float dy(int row, int j) const { return widen(grad[row * kK + j]); }
};

inline Matrix matrix(std::vector<bf16>& values, int columns) { return {values.data(), kRows, columns, columns}; }
inline Matrix matrix(const std::vector<bf16>& values, int columns) {
  return {const_cast<bf16*>(values.data()), kRows, columns, columns};
}

// f(row, tap, the tap's row) for all that are in the image
template <typename F>
void for_taps(F f) {
  for (int row = 0; row < kRows; ++row)
    for (int tap = 0; tap < 9; ++tap) {
      const int y = row / kWidth % kHeight + tap / 3 - 1, x = row % kWidth + tap % 3 - 1;
      if (0 <= y && y < kHeight && 0 <= x && x < kWidth) f(row, tap, row + (tap / 3 - 1) * kWidth + tap % 3 - 1);
    }
}

class Deviation {
 public:
  void add(float got, float expected) {
    const float off = std::abs(got - expected);
    largest_ = off == off && largest_ == largest_ ? std::max(largest_, off) : NAN;
    scale_ = std::max(scale_, std::abs(expected));
  }
  void print(const char* error) const { std::printf("%s %g\n", error == nullptr ? "ran" : "error", largest_ / scale_); }

 private:
  float largest_ = 0, scale_ = 0;
};

inline void check_forward(const char* (*run)(const Conv3x3&)) {
  const Problem problem;
  std::vector<bf16> out(kRows * kK, narrow<bf16>(NAN));
  Conv3x3 p{};
  p.z = matrix(problem.z, kB), p.affine = problem.affine(), p.weight = problem.weight.data();
  p.out = matrix(out, kK), p.pixels = pixels(kImages, kHeight, kWidth, kSmallConvTile);
  p.aligned = true, p.out_width = 1;
  std::vector<float> partials(p.pixels.tiles * 2 * kK, NAN);
  p.partials = partials.data();
  const char* error = run(p);
  std::vector<float> expected(kRows * kK);
  for_taps([&](int row, int tap, int from) {
    for (int j = 0; j < kK; ++j)
      for (int b = 0; b < kB; ++b) expected[row * kK + j] += problem.a(from, b) * problem.w(j, tap, b);
  });
  Deviation deviation;
  for (int i = 0; i < kRows * kK; ++i) deviation.add(widen(out[i]), expected[i]);
  for (int tile = 0; tile < p.pixels.tiles; ++tile)
    for (int j = 0; j < kK; ++j) {
      const int first = tile * kSmallConvTile, last = std::min(first + kSmallConvTile, kRows);
      float sum = 0;
      for (int row = first; row < last; ++row) sum += widen(out[row * kK + j]);
      deviation.add(partials[tile * 2 * kK + j], sum / (last - first));
    }
  deviation.print(error);
}

inline void check_grad_input(const char* (*run)(const Conv3x3GradInput&)) {
  const Problem problem;
  std::vector<bf16> scaled(kRows * kB, narrow<bf16>(NAN));
  Conv3x3GradInput p{};
  p.grad = matrix(problem.grad, kK), p.z = matrix(problem.z, kB), p.affine = problem.affine();
  p.weight = problem.weight.data(), p.scaled = matrix(scaled, kB);
  p.pixels = pixels(kImages, kHeight, kWidth, kGradTile / 2);
  p.blocks = 1, p.aligned = true, p.grad_aligned = false, p.scaled_width = 8;
  std::vector<float> partials(2 * kB, NAN);
  p.partials = partials.data();
  const char* error = run(p);
  std::vector<float> d(kRows * kB);
  for_taps([&](int row, int tap, int to) {  // dY's row is `row`, D's the tap's
    for (int j = 0; j < kK; ++j)
      for (int b = 0; b < kB; ++b)
        if (problem.normalised(to, b) > 0) d[to * kB + b] += problem.dy(row, j) * problem.w(j, tap, b);
  });
  Deviation values, sums;
  for (int i = 0; i < kRows * kB; ++i) values.add(widen(scaled[i]), problem.scale[i % kB] * d[i]);
  for (int b = 0; b < kB; ++b) {
    float sum = 0, centred = 0;
    for (int row = 0; row < kRows; ++row) {
      sum += d[row * kB + b];
      centred += d[row * kB + b] * (widen(problem.z[row * kB + b]) - problem.mean[b]);
    }
    sums.add(partials[b], sum), sums.add(partials[kB + b], centred);
  }
  sums.print(error);
  values.print(error);
}

inline void check_grad_weight(const char* (*run)(const Conv3x3GradWeight&)) {
  const Problem problem;
  std::vector<bf16> dz = problem.z;
  Conv3x3GradWeight p{};
  p.grad = matrix(problem.grad, kK), p.z = matrix(problem.z, kB), p.affine = problem.affine();
  p.dz = matrix(dz, kB), p.p = problem.p.data(), p.q = problem.q.data(), p.count = 3;
  p.pixels = pixels(kImages, kHeight, kWidth, kGradTile);
  p.ranges = 1, p.tiles_each = p.pixels.tiles, p.aligned = true, p.grad_aligned = false;
  std::vector<float> partials(kK * 9 * kB, NAN), expected(kK * 9 * kB);
  p.partials = partials.data();
  const char* error = run(p);
  for_taps([&](int row, int tap, int to) {  // dY's row is `row`, Z's the tap's
    for (int j = 0; j < kK; ++j)
      for (int b = 0; b < kB; ++b) expected[(j * 9 + tap) * kB + b] += problem.dy(row, j) * problem.a(to, b);
  });
  Deviation products, completed;
  for (int i = 0; i < kK * 9 * kB; ++i) products.add(partials[i], expected[i]);
  for (int i = 0; i < kRows * kB; ++i) {
    const int b = i % kB;
    const float z = widen(problem.z[i]);
    completed.add(widen(dz[i]), z + (problem.p[b] + 2 * problem.q[b] * (z - problem.mean[b])) / 3);
  }
  products.print(error);
  completed.print(error);
}

}  // namespace densenet_fast::cuda
