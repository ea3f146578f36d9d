// The head: BN-ReLU and the mean over an image's pixels, forward and backward.
#include "inference.h"
#include "readers.h"

namespace densenet_fast {
namespace {

constexpr int64_t kBlock = 64;  // pixels summed by themselves, so that rounding does not grow with their number

int64_t pixels(int64_t rows, int64_t images) {
  STD_TORCH_CHECK(images > 0 && rows > 0 && rows % images == 0, "images: expected a divisor of ", rows, ", got ",
                  images);
  return rows / images;
}

}  // namespace

Tensor head(const Tensor& x, Affine affine, int64_t images) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> m(x, "x");
    const int64_t size = pixels(m.rows, images);
    Tensor out = empty(x, {images, m.cols});
    const Matrix<T> result(out, "out");
    torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        std::vector<float> sum = zeros(m.cols);
        for (int64_t first = 0; first < size; first += kBlock) {
          const int64_t n = std::min(kBlock, size - first);
          pool_kernels_of<T>().bn_relu_total(m.from(image * size + first), n, m.cols, affine, sum.data());
        }
        pool_kernels_of<T>().scaled(sum.data(), m.cols, 1.0f / size, result.row(image));
      }
    });
    return out;
  });
}

std::tuple<Tensor, Tensor> head_backward(const Tensor& grad, const Tensor& x, Affine affine) {
  return by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> g(grad, "grad"), m(x, "x");
    STD_TORCH_CHECK(g.cols == m.cols, "grad: expected ", m.cols, " columns, got ", g.cols);
    const int64_t size = pixels(m.rows, g.rows);
    Tensor out = empty(x, {m.rows, m.cols});
    const Matrix<T> result(out, "out");
    const Tiles tiles(m.rows, 2 * m.cols * sizeof(T));
    std::vector<ColumnSums> sums = column_sums(tiles.chunks, m.cols);
    tiles.each([&](int64_t tile, int64_t first, int64_t n) {
      for (int64_t row = first, end; row < first + n; row = end) {
        const int64_t image = row / size;
        end = std::min({(image + 1) * size, first + n, row + kBlock});
        sums[tile / tiles.per_chunk].add([&](GradientSums out) {
          pool_kernels_of<T>().mask_average(g.row(image), 1.0f / size, m.from(row), end - row, m.cols, affine,
                                            result.row(row), out);
        });
      }
    });
    return std::tuple<Tensor, Tensor>(out, total(sums, x));
  });
}

namespace {

Tensor bn_relu_global_avgpool(Tensor x, Tensor mean, Tensor scale, Tensor shift, int64_t images) {  // [M, C], [C] each
  return head(x, affine(mean, scale, shift, x.size(1)), images);
}

// The same by running statistics
Tensor bn_relu_global_avgpool_inference(Tensor x, std::vector<Tensor> tensors, double eps, int64_t images) {  // [M, C]
  STD_TORCH_CHECK(tensors.size() == kNormTensors, "tensors: expected four");
  return head(x, FrozenNorm(tensors.data(), eps, x.size(1)).affine(), images);
}

std::tuple<Tensor, Tensor> bn_relu_global_avgpool_backward(Tensor grad, Tensor x, Tensor mean, Tensor scale,
                                                           Tensor shift) {  // [N, C], [M, C], [C] each
  return head_backward(grad, x, affine(mean, scale, shift, x.size(1)));
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_bn_relu_global_avgpool", TORCH_BOX(&densenet_fast::bn_relu_global_avgpool));
  m.impl("cpu_bn_relu_global_avgpool_inference", TORCH_BOX(&densenet_fast::bn_relu_global_avgpool_inference));
  m.impl("cpu_bn_relu_global_avgpool_backward", TORCH_BOX(&densenet_fast::bn_relu_global_avgpool_backward));
}
