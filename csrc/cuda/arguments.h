// Torch's tensors as the kernels take them: checked, all of one device, and how wide the accesses may be.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "recorder.h"

namespace densenet_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline Type type_of(const Tensor& t, const char* kernel, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::BFloat16:
      return Type::bf16;
    default:
      STD_TORCH_CHECK(false, kernel, ": ", name, ": expected float32, float64, float16 or bfloat16");
      return Type::f32;
  }
}

// What a launch has in common: the device and stream, the dtype of matrices and of vectors, and the widest access that
// every address so far allows
class Arguments {
 public:
  Arguments(const char* kernel, const Tensor& x, int64_t stream)
      : kernel_(kernel), like_(x), type_(type_of(x, kernel, "x")), stream_(reinterpret_cast<void*>(stream)) {
#ifndef DENSENET_FAST_EMULATED
    STD_TORCH_CHECK(x.is_cuda() || recorder != nullptr, kernel, ": x: expected tensors on a GPU");
#endif
    STD_TORCH_CHECK(x.numel() > 0, kernel, ": x: expected at least one value, got ", shape(x));
    width_ = static_cast<int>(16 / element_size(type_));
    if (x.is_cuda()) guard_.emplace(x.get_device_index());
  }

  const char* kernel() const { return kernel_; }
  Type type() const { return type_; }
  void* stream() const { return stream_; }
  int width() const { return width_; }

  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() == like_.is_cuda() && t.get_device_index() == like_.get_device_index(), kernel_, ": ",
                    name, ": expected all tensors on one device");
  }

  // [rows, cols], adjacent columns
  Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && (cols == 1 || t.stride(1) == 1), kernel_,
                    ": ", name, ": expected a matrix [", rows, ", ", cols, "] of adjacent columns, got ", shape(t));
    STD_TORCH_CHECK(t.scalar_type() == like_.scalar_type(), kernel_, ": ", name, ": dtype unlike the others'");
    const Matrix m{t.data_ptr(), rows, cols, t.stride(0)};
    if (rows > 1) fit(m.ld, 1);
    align(m.data, element_size(type_));
    return m;
  }
  Matrix matrix(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2, kernel_, ": ", name, ": expected a matrix, got ", shape(t));
    return matrix(t, name, t.size(0), t.size(1));
  }

  // [N, k, *spatial] of any strides, as rows of pixels; allows wide accesses where `wide`
  Strided strided(const Tensor& t, const char* name, ScalarType dtype, bool wide) {
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() >= 2 && t.dim() <= 5 && t.scalar_type() == dtype, kernel_, ": ", name,
                    ": expected [N, k, *spatial] of the right dtype, got ", shape(t));
    Strided s{t.data_ptr(), 0, {}, {}, t.size(1) == 1 ? 1 : t.stride(1)};
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (d == 1 || t.size(d) == 1) continue;
      const bool joined = s.dims > 0 && s.strides[s.dims - 1] == t.size(d) * t.stride(d);
      const int at = joined ? s.dims - 1 : s.dims++;
      s.sizes[at] = joined ? s.sizes[at] * t.size(d) : t.size(d);
      s.strides[at] = t.stride(d);
    }
    if (s.dims == 0) s.dims = 1, s.sizes[0] = 1, s.strides[0] = 0;
    if (wide) {
      align(s.data, element_size(type_));
      for (int d = 0; d < s.dims; ++d) fit(s.strides[d], 1);
    }
    return s;
  }

  // uint8 [rows, cols], contiguous
  uint8_t* bytes(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.is_contiguous() &&
                        t.scalar_type() == ScalarType::Byte,
                    kernel_, ": ", name, ": expected contiguous uint8 [", rows, ", ", cols, "], got ", shape(t));
    fit(cols, 1);
    align(t.data_ptr(), 1);
    return static_cast<uint8_t*>(t.data_ptr());
  }

  // [size] in accumulation dtype
  void* vector(const Tensor& t, const char* name, int64_t size) const {
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == vector_dtype(),
                    kernel_, ": ", name, ": expected ", size, " contiguous ",
                    type_ == Type::f64 ? "float64" : "float32", " values, got ", shape(t));
    return t.data_ptr();
  }
  void* vector(const std::optional<Tensor>& t, const char* name, int64_t size) const {
    return t ? vector(*t, name, size) : nullptr;
  }

  // [size] in any dtype that kernels take
  void* any_vector(const Tensor& t, const char* name, int64_t size) const {
    check_device(t, name);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_contiguous(), kernel_, ": ", name, ": expected ", size,
                    " contiguous values, got ", shape(t));
    return t.data_ptr();
  }

  // One float64 value, if there is any
  const double* count(const std::optional<Tensor>& t) const {
    if (!t) return nullptr;
    check_device(*t, "count");
    STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Double, kernel_,
                    ": count: expected one float64 value on x's device, got ", shape(*t));
    return static_cast<const double*>(t->data_ptr());
  }

  Affine affine(const Tensor& mean, const Tensor& rstd, const Tensor& bias, const std::optional<Tensor>& weight,
                int64_t cols) const {
    Affine a{vector(mean, "mean", cols), vector(rstd, "rstd", cols), affine_vector(bias, "bias", cols)};
    a.narrow_bias = bias.scalar_type() != vector_dtype();
    if (weight) {
      a.weight = affine_vector(*weight, "weight", cols);
      a.narrow_weight = weight->scalar_type() != vector_dtype();
    }
    return a;
  }

  Tensor new_matrix(int64_t rows, int64_t cols) const { return torch::stable::new_empty(like_, {rows, cols}); }
  Tensor new_vector(int64_t size) const { return torch::stable::new_empty(like_, {size}, vector_dtype()); }
  // (sum or mean, other) of every tile
  Tensor partials(const Tiling& t, int64_t cols) const {
    return torch::stable::new_empty(like_, {t.tiles, 2, cols}, vector_dtype());
  }

  void launched(const char* error) const {
    STD_TORCH_CHECK(error == nullptr, "densenet_fast: the CUDA kernel ", kernel_, " on ", shape(like_), ": ", error);
  }

 private:
  static int64_t element_size(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
  ScalarType vector_dtype() const { return type_ == Type::f64 ? ScalarType::Double : ScalarType::Float; }

  // [size] in the matrix's or the accumulation dtype
  const void* affine_vector(const Tensor& t, const char* name, int64_t size) const {
    return t.scalar_type() == like_.scalar_type() ? any_vector(t, name, size) : vector(t, name, size);
  }
  void align(const void* data, int64_t size) { fit(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)), size); }
  // Narrows accesses, from 16 bytes to 8 to one element, until `distance` is a multiple of them, in units of `size`
  void fit(int64_t distance, int64_t size) {
    while (width_ > 1 && distance % (size * width_) != 0)
      width_ = width_ * element_size(type_) == 16 ? static_cast<int>(8 / element_size(type_)) : 1;
  }

  const char* kernel_;
  const Tensor& like_;
  Type type_;
  void* stream_;
  int width_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace densenet_fast::cuda
