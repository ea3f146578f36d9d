// Statistics, normalisation, masks and gradients of columns: no products.
#include <string>

#include "running_statistics.h"
#include "statistics.h"

namespace densenet_fast {
namespace {

void huge_pages(Tensor x) {
  by_dtype(x, [&](auto zero) { advise_huge_pages(Matrix<decltype(zero)>(x, "x")); });
}

std::string capability() { return kernels().name; }

void statistics(Tensor x, Tensor mean, Tensor var, Tensor rstd, double eps) {  // [M, C], [C] each
  by_dtype(x, [&](auto zero) {
    const Matrix<const decltype(zero)> m(x, "x");
    column_statistics(m, {mean, var, rstd, eps, m.cols});
  });
}

Tensor bn_relu(Tensor x, Tensor mean, Tensor scale, Tensor shift) {  // [M, C], [C] each
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const Affine a = affine(mean, scale, shift, m.cols);
    Tensor out = empty(x, {m.rows, m.cols});
    const Matrix<T> result(out, "out");
    Tiles(m.rows, m.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      kernels_of<T>().bn_relu(m.from(first), n, m.cols, a, result.from(first));
    });
    return out;
  });
}

// D = grad * (y > 0): out = scale * D, sum D, sum D * (x - mean); out may be grad
Tensor mask(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor out) {  // [M, C], [C] each, [M, C]
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    const Matrix<T> result(out, "out");
    check_shape(g, m, "grad");
    check_shape(result, m, "out");
    const Affine a = affine(mean, scale, shift, m.cols);
    const Tiles tiles(m.rows, 2 * m.cols * sizeof(T));
    std::vector<ColumnSums> sums = column_sums(tiles.chunks, m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      constexpr int64_t kRows = 32;  // summed by themselves
      for (int64_t row = first; row < first + n; row += kRows) {
        sums[tile / tiles.per_chunk].add([&](GradientSums out) {
          kernels_of<T>().mask(g.from(row), m.from(row), std::min(first + n - row, kRows), m.cols, a, result.from(row),
                               out);
        });
      }
    });
    return total(sums, x);
  });
}

// out = grad + (p + 2 * q * (x - mean)) / count; out may be grad
void finalise(Tensor grad, Tensor x, Tensor mean, Tensor p, Tensor q, double count, Tensor out) {  // [M, n], [n] each
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad");
    const Matrix<T> result(out, "out");
    const Finalise<T> through(x, mean, p, q, count);
    through.check(g);
    check_shape(result, g, "out");
    through.apply(g, result);
  });
}

void update_running_statistics(std::vector<Tensor> vectors, std::vector<Tensor> counters, std::vector<double> momenta,
                               std::vector<int64_t> starts, Tensor mean, Tensor var, double count) {
  // [n] each, [] each, [], [], [C] each
  const RunningStatistics running(vectors, counters, momenta, starts);
  const int64_t packed = mean.numel();
  const float *m = vector(mean, packed, "mean"), *v = vector(var, packed, "var");
  running.check(0, momenta.size(), packed);
  running.update(0, momenta.size(), m, v, count);
  running.count_batch();
}

// x *= mask * scale
void dropout(Tensor x, Tensor mask, double scale) {  // [M, C] each, mask bool
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask: expected bool");
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == x.size(0) && mask.size(1) == x.size(1),
                  "mask: expected x's shape");
  STD_TORCH_CHECK(mask.size(1) < 2 || mask.stride(1) == 1, "mask: expected adjacent columns");
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> m(x, "x");
    const uint8_t* kept = static_cast<const uint8_t*>(mask.data_ptr());
    const int64_t ld = mask.stride(0);
    Tiles(m.rows, m.cols * sizeof(T)).each([&](int64_t, int64_t first, int64_t n) {
      kernels_of<T>().dropout(m.from(first), {kept + first * ld, ld}, n, m.cols, static_cast<float>(scale));
    });
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&densenet_fast::capability));
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_huge_pages", TORCH_BOX(&densenet_fast::huge_pages));
  m.impl("cpu_statistics", TORCH_BOX(&densenet_fast::statistics));
  m.impl("cpu_bn_relu", TORCH_BOX(&densenet_fast::bn_relu));
  m.impl("cpu_mask", TORCH_BOX(&densenet_fast::mask));
  m.impl("cpu_finalise", TORCH_BOX(&densenet_fast::finalise));
  m.impl("cpu_update_running_statistics", TORCH_BOX(&densenet_fast::update_running_statistics));
  m.impl("cpu_dropout", TORCH_BOX(&densenet_fast::dropout));
}
