// The stem in inference: a convolution of few input channels, BN-ReLU and the maximum over windows of 3 at distance 2,
// padded by 1. Nothing but the maxima is stored: a thread keeps the lines of the convolution that its windows cover.
//
//   P = the patches of one line of outputs, [width', kernel * kernel * C];   line = relu(bn(P @ W^T))
#include <cstring>

#include "inference.h"
#include "products.h"

namespace densenet_fast {
namespace {

constexpr int64_t kTileLines = 14;

// Copies of `count` values that overlap: a loop over few would take longer
template <typename T>
inline void copy_run(const T* from, int64_t count, T* to) {
  constexpr int64_t kPart = 16;
  if (count < kPart) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + kPart <= count; i += kPart) std::memcpy(to + i, from + i, kPart * sizeof(T));
  std::memcpy(to + count - kPart, from + count - kPart, kPart * sizeof(T));
}

// Images [N, C, H, W], channels last, and where a convolution reads them
template <typename T>
struct Images {
  const T* data;
  int64_t batch, channels, height, width, image, line, pixel;  // strides of the last three
  int64_t kernel, stride, padding;
  int64_t conv_height, conv_width, pooled_height, pooled_width;

  Images(const Tensor& t, int64_t kernel, int64_t stride, int64_t padding)
      : batch(t.size(0)),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        image(t.stride(0)),
        line(t.stride(2)),
        pixel(t.stride(3)),
        kernel(kernel),
        stride(stride),
        padding(padding),
        conv_height(outputs(height)),
        conv_width(outputs(width)),
        pooled_height((conv_height + 1) / 2),
        pooled_width((conv_width + 1) / 2) {
    STD_TORCH_CHECK(t.stride(1) == 1 || channels == 1, "images: expected adjacent channels");
    STD_TORCH_CHECK(t.scalar_type() == kDtype<T>, "images: dtype unlike the others'");
    STD_TORCH_CHECK(conv_height > 0 && conv_width > 0, "images: expected at least the kernel's size");
    data = static_cast<const T*>(t.data_ptr());
  }

  int64_t outputs(int64_t size) const {
    return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
  }
  int64_t patch() const { return kernel * kernel * channels; }

  // The patches of line y of n's outputs, `ld` apart; what is behind each stays as it is
  void patches(int64_t n, int64_t y, T* out, int64_t ld) const {
    const int64_t run = kernel * channels;
    for (int64_t i = 0; i < kernel; ++i, out += run) {
      const int64_t v = y * stride - padding + i;
      const T* from = data + n * image + v * line;
      for (int64_t x = 0; x < conv_width; ++x) {
        T* to = out + x * ld;
        const int64_t u = x * stride - padding;
        if (v < 0 || v >= height) {
          std::fill_n(to, run, T{});
        } else if (u >= 0 && u + kernel <= width && pixel == channels) {
          copy_run(from + u * pixel, run, to);
        } else {
          for (int64_t j = 0; j < kernel; ++j) {
            for (int64_t c = 0; c < channels; ++c) {
              to[j * channels + c] = 0 <= u + j && u + j < width ? from[(u + j) * pixel + c] : T{};
            }
          }
        }
      }
    }
  }
};

// The lines of the convolution that a window of lines covers, by their number modulo three
template <typename T>
struct RecentLines {
  int64_t size, first = -1, end = -1;  // the lines that are there
  std::unique_ptr<T[], decltype(&std::free)> data;

  explicit RecentLines(int64_t size) : size(size), data(scratch<T>(3 * size)) {}

  T* line(int64_t number) const { return data.get() + number % 3 * size; }
};

// out [N * H' * W', B] = maxpool(relu(bn(conv(images, weight))))
void stem_inference(Tensor images, Tensor weight, std::vector<Tensor> tensors, double eps, int64_t stride,
                    int64_t padding, Tensor out) {  // [N, C, H, W], [B, kernel, kernel, C], [B] each
  by_dtype(images, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4 && weight.is_contiguous() &&
                        weight.size(1) == weight.size(2) && weight.size(3) == images.size(1),
                    "images, weight: expected [N, C, H, W] and [B, kernel, kernel, C]");
    STD_TORCH_CHECK(stride > 0 && padding >= 0 && tensors.size() == kNormTensors,
                    "stride, padding, tensors: expected a stride, a padding, and four");
    const Images<T> in(images, weight.size(1), stride, padding);
    const int64_t made = weight.size(0), steps = steps_of<T>(in.patch());
    const FrozenNorm norm(tensors.data(), eps, made);
    const Affine then = norm.affine();
    const Weight<T> w(torch::stable::view(weight, {made, in.patch()}));
    const Matrix<T> result(out, "out");
    STD_TORCH_CHECK(result.rows == in.batch * in.pooled_height * in.pooled_width && result.cols == made,
                    "out: expected a row for each maximum, and a column for each output channel");
    advise_huge_pages(result);
    const Panels weights(made, steps);
    w.pack(weights, false);
    const int64_t product_ld = weights.padded(), words = steps + (steps % 16 == 0 ? kSkew : 0),
                  ld = words * kPerWord<T>;
    const Tiles tiles(in.batch * in.pooled_height, kTileLines, 1);
    tiles.share([&](auto each) {
      const auto patches = scratch<T>(in.conv_width * ld);
      std::fill_n(patches.get(), in.conv_width * ld, T{});
      const auto product = scratch<float>(in.conv_width * product_ld);
      RecentLines<T> lines(in.conv_width * made);
      const auto convolve = [&](int64_t n, int64_t y) {
        in.patches(n, y, patches.get(), ld);
        for (int64_t p = 0; p < weights.count; ++p) {
          kernels_of<T>().product({as_words(patches.get()), words, 1}, weights.operand(p), in.conv_width,
                                  weights.width(p), steps, product.get() + 32 * p, product_ld, false);
        }
        kernels_of<T>().store_rows({product.get(), product_ld}, in.conv_width, made, nullptr, &then,
                                   {lines.line(n * in.conv_height + y), made});
      };
      each([&](int64_t, int64_t first, int64_t count) {
        for (int64_t output = first; output < first + count; ++output) {
          const int64_t n = output / in.pooled_height, o = output % in.pooled_height;
          const int64_t top = n * in.conv_height;
          const int64_t begin = std::max<int64_t>(2 * o - 1, 0), end = std::min(2 * o + 2, in.conv_height);
          Lines<T> window;
          for (int64_t y = begin; y < end; ++y) {
            if (top + y < lines.first || top + y >= lines.end) convolve(n, y);
            window.data[window.count++] = lines.line(top + y);
          }
          lines.first = top + begin;
          lines.end = top + end;
          pool_kernels_of<T>().max(window, made, in.conv_width, made, result.from(output * in.pooled_width));
        }
      });
    });
  });
}

}  // namespace
}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) {
  m.impl("cpu_stem_inference", TORCH_BOX(&densenet_fast::stem_inference));
}
