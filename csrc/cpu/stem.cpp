// The stem: its convolution; and in inference that, BN-ReLU and the maximum over windows of 3 at distance 2, padded by
// 1. Inference stores nothing but the maxima: a thread keeps the lines of the convolution that its windows cover.
#include "image_convolution.h"
#include "inference.h"
#include "parts.h"

namespace densenet_fast {
namespace {

constexpr int64_t kTileLines = 14;

// The lines of the convolution that a window of lines covers, by their number modulo three
template <typename T>
struct RecentLines {
  int64_t size, first = -1, end = -1;  // the lines that are there
  Scratch<T> data;

  explicit RecentLines(int64_t size) : size(size), data(scratch<T>(3 * size)) {}

  T* line(int64_t number) const { return data.get() + number % 3 * size; }
};

}  // namespace

Tensor convolution(Tensor images, Tensor weight, int64_t stride, int64_t padding) {
  return by_dtype(images, [&](auto zero) {
    using T = decltype(zero);
    const ImageConvolution<T> convolution(images, weight, stride, padding);
    const int64_t height = convolution.lines, width = convolution.columns;
    Tensor out = empty(images, {convolution.batch * height * width, convolution.made});
    const Matrix<T> result(out, "out");
    advise_huge_pages(result);
    Tiles(convolution.batch * height, kTileLines, 1).share([&](auto each) {
      typename ImageConvolution<T>::Workspace own(convolution);
      each([&](int64_t, int64_t first, int64_t count) {
        for (int64_t line = first; line < first + count; ++line) {
          convolution.line(own, line / height, line % height, nullptr, result.from(line * width));
        }
      });
    });
    return out;
  });
}

// Sums in float for a tile, in double over the tiles
Tensor convolution_grad_weight(Tensor grad, Tensor images, Tensor weight, int64_t stride, int64_t padding) {
  return by_dtype(images, [&](auto zero) {
    using T = decltype(zero);
    const ImageConvolution<T> convolution(images, weight, stride, padding);
    const int64_t height = convolution.lines, width = convolution.columns, made = convolution.made;
    const Matrix<const T> g(grad, "grad");
    STD_TORCH_CHECK(g.rows == convolution.batch * height * width && g.cols == made,
                    "grad: expected a row for each output pixel, and a column for each output channel");
    const Tiles tiles(convolution.batch * height, kTileLines, 1);
    std::vector<std::vector<double>> parts(tiles.chunks, std::vector<double>(convolution.sums()));
    tiles.run([&](int64_t chunk) {
      typename ImageConvolution<T>::Workspace own(convolution);
      std::vector<float> sums(convolution.sums());
      for (int64_t tile = chunk * tiles.per_chunk; tile < (chunk + 1) * tiles.per_chunk; ++tile) {
        const int64_t first = tiles.begin(tile), end = tiles.begin(tile + 1);
        for (int64_t line = first; line < end; ++line) {
          convolution.gradient(own, line / height, line % height, g.from(line * width), sums.data(), line > first);
        }
        for (size_t i = 0; first < end && i < sums.size(); ++i) parts[chunk][i] += sums[i];
      }
    });
    Tensor out = new_floats(images, {made, convolution.kernel, convolution.kernel, convolution.channels});
    float* to = floats_of(out);
    for (int64_t b = 0, taps = out.numel() / made; b < made; ++b) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        double sum = 0;
        for (const std::vector<double>& part : parts) sum += part[convolution.place(b, tap)];
        *to++ = sum;
      }
    }
    return out;
  });
}

namespace {

// out [N * H' * W', B] = maxpool(relu(bn(conv(images, weight))))
void stem_inference(Tensor images, Tensor weight, std::vector<Tensor> tensors, double eps, int64_t stride,
                    int64_t padding, Tensor out) {  // [N, C, H, W], [B, kernel, kernel, C], [B] each
  by_dtype(images, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(tensors.size() == kNormTensors, "tensors: expected four");
    const ImageConvolution<T> convolution(images, weight, stride, padding);
    const int64_t made = convolution.made, height = convolution.lines, width = convolution.columns;
    const int64_t pooled_height = (height + 1) / 2, pooled_width = (width + 1) / 2;
    const FrozenNorm norm(tensors.data(), eps, made);
    const Affine then = norm.affine();
    const Matrix<T> result(out, "out");
    STD_TORCH_CHECK(result.rows == convolution.batch * pooled_height * pooled_width && result.cols == made,
                    "out: expected a row for each maximum, and a column for each output channel");
    advise_huge_pages(result);
    Tiles(convolution.batch * pooled_height, kTileLines, 1).share([&](auto each) {
      typename ImageConvolution<T>::Workspace own(convolution);
      RecentLines<T> lines(width * made);
      each([&](int64_t, int64_t first, int64_t count) {
        for (int64_t output = first; output < first + count; ++output) {
          const int64_t n = output / pooled_height, o = output % pooled_height, top = n * height;
          const int64_t begin = std::max<int64_t>(2 * o - 1, 0), end = std::min(2 * o + 2, height);
          Lines<T> window;
          for (int64_t y = begin; y < end; ++y) {
            T* line = lines.line(top + y);
            if (top + y < lines.first || top + y >= lines.end) convolution.line(own, n, y, &then, {line, made});
            window.data[window.count++] = line;
          }
          lines.first = top + begin;
          lines.end = top + end;
          pool_kernels_of<T>().max(window, made, width, made, result.from(output * pooled_width));
        }
      });
    });
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_convolution", TORCH_BOX(&densenet_fast::convolution));
  m.impl("cpu_convolution_grad_weight", TORCH_BOX(&densenet_fast::convolution_grad_weight));
  m.impl("cpu_stem_inference", TORCH_BOX(&densenet_fast::stem_inference));
}
