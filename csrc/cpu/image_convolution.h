// A convolution of few input channels over images, line by line. Each is a product, whose left factor stands in the
// padded lines that its windows cover: row x begins where window x does, and the rows overlap.
//
//   line y = X @ W^T;   X [columns, kernel * kernel * C], in a part for each padded line, rows stride * C apart there
//   dW^T = the sum over lines of X^T @ D;   D [columns, B], the gradient of the line
//
// Example:
//
//   const ImageConvolution<float> convolution(x, weight, 2, 3);                // windows 2 apart, images padded by 3
//   ImageConvolution<float>::Workspace own(convolution);                       // of one thread
//   convolution.line(own, 0, 5, nullptr, Matrix<float>(out, "out").from(0));  // line 5 of the first image
#pragma once

#include <bit>

#include "panels.h"
#include "tiles.h"

namespace densenet_fast {

template <typename T>
float to_float(T value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else {
    return std::bit_cast<float>(uint32_t{value.bits} << 16);
  }
}

// Images [N, C, H, W], channels last, with a weight [B, kernel, kernel, C] in their dtype or in float32. Products are
// float32's; a float32 weight is rounded to the images' dtype first.
template <typename T>
struct ImageConvolution {
  int64_t batch, channels, height, width, kernel, stride, padding;
  int64_t made, lines, columns;  // output channels, and lines and columns of the result

  ImageConvolution(const Tensor& images, const Tensor& weight, int64_t stride, int64_t padding)
      : batch(checked(images, weight, stride, padding).size(0)),
        channels(images.size(1)),
        height(images.size(2)),
        width(images.size(3)),
        kernel(weight.size(1)),
        stride(stride),
        padding(padding),
        made(weight.size(0)),
        lines(outputs(height)),
        columns(outputs(width)),
        data_(static_cast<const T*>(images.data_ptr())),
        image_(images.stride(0)),
        line_(images.stride(2)),
        pixel_(images.stride(3)),
        weights_(made, kernel * kernel * channels) {
    STD_TORCH_CHECK(lines > 0 && columns > 0, "images: expected at least the kernel's size");
    pack(weight);
  }

  // What a thread works in: the padded lines that the windows of its last line covered, and products
  struct Workspace {
    Scratch<float> lines, product;
    int64_t last = -1;  // number of the last line

    explicit Workspace(const ImageConvolution& of)
        : lines(scratch<float>(of.kernel * of.padded_line())),
          product(scratch<float>(of.columns * of.weights_.padded())) {}
  };

  // Line y of image n's result, [columns, B]; relu(then(line)) if that is given
  void line(Workspace& own, int64_t n, int64_t y, const Affine* then, Rows<T> out) const {
    const bool direct = sizeof(T) == sizeof(float) && !then && made == weights_.padded();
    const int64_t ld = direct ? out.ld : weights_.padded();
    float* product = direct ? reinterpret_cast<float*>(out.data) : own.product.get();
    cover(own, n, y);
    const Operand rows = {as_words(own.lines.get()), stride * channels, 1, kernel, padded_line()};
    for (int64_t p = 0; p < weights_.count; ++p) {
      kernels_of<float>().product(rows, weights_.operand(p), columns, weights_.width(p), kernel * channels,
                                  product + 32 * p, ld, false);
    }
    if (!direct) kernels_of<T>().store_rows({product, ld}, columns, made, nullptr, then, out);
  }

  int64_t sums() const { return weights_.steps * weights_.padded(); }
  int64_t place(int64_t b, int64_t tap) const { return tap * weights_.padded() + b; }

  // sums = (or +=) what line y of image n has in the weight's gradient, from the line's gradient [columns, B]. That of
  // output channel b and tap (i, j, c) has its place(b, (i * kernel + j) * C + c).
  void gradient(Workspace& own, int64_t n, int64_t y, Rows<const T> grad, float* sums, bool accumulate) const {
    const int64_t ld = weights_.padded(), row = kernel * channels;
    cover(own, n, y);
    float* wide = own.product.get();
    for (int64_t x = 0; x < columns; ++x) {
      float* end = std::transform(grad.data + x * grad.ld, grad.data + x * grad.ld + made, wide + x * ld, to_float<T>);
      std::fill(end, wide + (x + 1) * ld, 0.0f);
    }
    for (int64_t i = 0; i < kernel; ++i) {
      const Operand transposed = {as_words(own.lines.get() + i * padded_line()), 1, stride * channels};
      for (int64_t p = 0; p < weights_.count; ++p) {
        kernels_of<float>().product(transposed, {as_words(wide) + 32 * p, 0, ld}, row, weights_.width(p), columns,
                                    sums + i * row * ld + 32 * p, ld, accumulate);
      }
    }
  }

 private:
  static const Tensor& checked(const Tensor& images, const Tensor& weight, int64_t stride, int64_t padding) {
    STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4 && weight.is_contiguous() &&
                        weight.size(1) == weight.size(2) && weight.size(3) == images.size(1),
                    "images, weight: expected [N, C, H, W] and [B, kernel, kernel, C]");
    STD_TORCH_CHECK(stride > 0 && padding >= 0, "stride, padding: expected at least 1 and 0");
    STD_TORCH_CHECK(images.stride(1) == 1 || images.size(1) == 1, "images: expected adjacent channels");
    STD_TORCH_CHECK(images.scalar_type() == kDtype<T>, "images: dtype unlike the others'");
    return images;
  }

  int64_t outputs(int64_t size) const {
    return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
  }
  int64_t padded_line() const { return (width + 2 * padding) * channels; }

  // Fills the padded lines that the windows of line y cover, but those that they share with the line before
  void cover(Workspace& own, int64_t n, int64_t y) const {
    const bool follows = y > 0 && own.last == n * lines + y - 1;
    const int64_t kept = follows ? std::max<int64_t>(kernel - stride, 0) : 0;
    float* to = own.lines.get();
    to = std::copy_n(to + (kernel - kept) * padded_line(), kept * padded_line(), to);
    for (int64_t v = y * stride - padding + kept; v < y * stride - padding + kernel; ++v) to = padded(n, v, to);
    own.last = n * lines + y;
  }

  // Line v of image n with its padding. Returns where it ends.
  float* padded(int64_t n, int64_t v, float* to) const {
    if (v < 0 || v >= height) return std::fill_n(to, padded_line(), 0.0f);
    const T* from = data_ + n * image_ + v * line_;
    to = std::fill_n(to, padding * channels, 0.0f);
    if (pixel_ == channels) {
      to = std::transform(from, from + width * channels, to, to_float<T>);
    } else {
      for (int64_t x = 0; x < width; ++x, from += pixel_) to = std::transform(from, from + channels, to, to_float<T>);
    }
    return std::fill_n(to, padding * channels, 0.0f);
  }

  void pack(const Tensor& weight) {
    const int64_t count = weight.numel(), depth = kernel * kernel * channels;
    const bool wide = weight.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(wide || weight.scalar_type() == kDtype<T>, "weight: dtype unlike the others', and not float32");
    const auto rounded = scratch<T>(count);
    const T* values = static_cast<const T*>(weight.data_ptr());
    if (wide && sizeof(T) < sizeof(float)) {
      kernels_of<T>().store_rows({static_cast<const float*>(weight.data_ptr()), count}, 1, count, nullptr, nullptr,
                                 {rounded.get(), count});
      values = rounded.get();
    }
    std::vector<float> floats(count);
    std::transform(values, values + count, floats.begin(), to_float<T>);
    weights_.each([&](int64_t p) {
      kernels_of<float>().pack(floats.data() + 32 * p * depth, 1, depth, depth, weights_.valid(p), weights_.width(p),
                               weights_.panel(p));
    });
  }

  const T* data_;
  int64_t image_, line_, pixel_;  // distances
  Panels weights_;
};

}  // namespace densenet_fast
