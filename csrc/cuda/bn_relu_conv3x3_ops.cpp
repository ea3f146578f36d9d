// The ops of the 3x3 convolution: schemas, and from tensors to launches.
#include <algorithm>

#include "arguments.h"
#include "bn_relu_conv3x3.h"

namespace densenet_fast::cuda {
namespace {

using Optional = std::optional<Tensor>;
using Grid = std::vector<int64_t>;

constexpr int64_t kTilesPerRange = 4;  // at least: a partial product costs as much traffic as a few tiles

constexpr int64_t kMostPixels = INT32_MAX / 2;  // the same in cuda_bn_relu_conv3x3.py

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const Arguments& arguments, const Grid& grid, int64_t rows) {
  STD_TORCH_CHECK(arguments.type() == Type::f16 || arguments.type() == Type::bf16, arguments.kernel(),
                  ": x: expected float16 or bfloat16");
  STD_TORCH_CHECK(grid.size() == 3 && grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && grid[0] * grid[1] * grid[2] == rows,
                  arguments.kernel(), ": grid: expected three positive sizes of product ", rows);
  STD_TORCH_CHECK(rows <= kMostPixels, arguments.kernel(), ": x: expected at most ", kMostPixels, " rows, got ", rows);
}

// W2 [k, 3, 3, B], contiguous
const void* weight_of(const Arguments& arguments, const Tensor& weight, const Tensor& like, int64_t k, int64_t b) {
  arguments.check_device(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == k && weight.size(1) == 3 && weight.size(2) == 3 &&
                      weight.size(3) == b && weight.is_contiguous() && weight.scalar_type() == like.scalar_type(),
                  arguments.kernel(), ": weight: expected contiguous [", k, ", 3, 3, ", b, "] of x's dtype, got ",
                  shape(weight));
  return weight.data_ptr();
}

bool starts_at_16_bytes(const void* data, int64_t elements_apart) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && elements_apart % 8 == 0;
}
bool is_aligned(const Matrix& m) { return starts_at_16_bytes(m.data, m.rows > 1 ? m.ld : 0); }

// The widest accesses, in elements, that rows of m allow
int width_of(const Matrix& m) {
  const int64_t apart = m.rows > 1 ? 2 * m.ld : 0, start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(m.data));
  return (apart | start) % 16 == 0 ? 8 : (apart | start) % 8 == 0 ? 4 : 1;
}

// Tiles of `large` pixels, or of `small` ones where `enough` blocks would otherwise not be made
Pixels divided(const Grid& grid, int large, int small, int64_t columns, int64_t enough) {
  const Pixels p = pixels(grid[0], grid[1], grid[2], large);
  return p.tiles * columns >= enough ? p : pixels(grid[0], grid[1], grid[2], small);
}

void bn_relu_conv3x3_(Tensor z, Optional mean, Optional rstd, Optional norm_bias, Optional norm_weight, Tensor weight,
                      Optional bias, Grid grid, Optional keep, double keep_scale, Tensor out, Optional out_mean,
                      Optional out_var, Optional out_rstd, double eps, int64_t processors, int64_t stream) {
  Arguments arguments("bn_relu_conv3x3", z, stream);
  Conv3x3 p{};
  p.z = arguments.matrix(z, "x");
  check(arguments, grid, p.z.rows);
  const int64_t k = weight.size(0);
  p.weight = weight_of(arguments, weight, z, k, p.z.cols);
  p.out = arguments.matrix(out, "out", p.z.rows, k);
  STD_TORCH_CHECK(mean.has_value() == rstd.has_value() && mean.has_value() == norm_bias.has_value(), arguments.kernel(),
                  ": mean, rstd and bias: expected all or none");
  if (mean) p.affine = arguments.affine(*mean, *rstd, *norm_bias, norm_weight, p.z.cols);
  if (bias) {
    p.bias = arguments.any_vector(*bias, "bias", k);
    p.bias_type = type_of(*bias, arguments.kernel(), "bias");
  }
  if (keep) {
    arguments.check_device(*keep, "mask");
    STD_TORCH_CHECK(keep->dim() == 4 && keep->size(0) == grid[0] && keep->size(1) == k && keep->size(2) == grid[1] &&
                        keep->size(3) == grid[2] && keep->scalar_type() == ScalarType::Bool,
                    arguments.kernel(), ": mask: expected bool [N, k, H, W], got ", shape(*keep));
    p.keep = static_cast<const uint8_t*>(keep->data_ptr());
    for (int d = 0; d < 4; ++d) p.keep_strides[d] = keep->stride(d);
  }
  p.keep_scale = static_cast<float>(keep_scale);
  p.pixels = divided(grid, kConvTile, kSmallConvTile, 1, processors / 2);
  p.aligned = is_aligned(p.z) && starts_at_16_bytes(p.weight, p.z.cols);
  p.out_width = width_of(p.out);
  STD_TORCH_CHECK(out_mean.has_value() == out_var.has_value() && out_mean.has_value() == out_rstd.has_value(),
                  arguments.kernel(), ": mean, var and rstd: expected all or none");
  CombineStatistics c{};
  Optional partials;
  if (out_mean) {
    c.tiling.tiles = p.pixels.tiles;
    c.tiling.tile_rows = p.pixels.tile;
    partials = arguments.partials(c.tiling, k);
    c.partials = p.partials = partials->data_ptr();
    c.mean = arguments.vector(out_mean, "mean", k);
    c.var = arguments.vector(out_var, "var", k);
    c.rstd = arguments.vector(out_rstd, "rstd", k);
    c.eps = eps;
    c.rows = p.z.rows;
    c.cols = k;
    c.pixels = p.pixels;
  }
  arguments.launched(bn_relu_conv3x3(p, arguments.type(), arguments.stream()));
  if (out_mean) arguments.launched(combine_statistics(c, arguments.type(), arguments.stream()));
}

// scaled = scale * D; the partial sums [blocks, 2, B] of blocks of which `resident` are on the device at once
Tensor bn_relu_conv3x3_grad_input_(Tensor grad, Tensor z, Tensor mean, Tensor rstd, Tensor norm_bias,
                                   Optional norm_weight, Tensor weight, Grid grid, Tensor scaled, int64_t processors,
                                   int64_t resident, int64_t stream) {
  Arguments arguments("bn_relu_conv3x3_grad_input", z, stream);
  Conv3x3GradInput p{};
  p.z = arguments.matrix(z, "x");
  check(arguments, grid, p.z.rows);
  const int64_t k = weight.size(0);
  p.grad = arguments.matrix(grad, "grad", p.z.rows, k);
  p.weight = weight_of(arguments, weight, z, k, p.z.cols);
  p.scaled = arguments.matrix(scaled, "out", p.z.rows, p.z.cols);
  p.affine = arguments.affine(mean, rstd, norm_bias, norm_weight, p.z.cols);
  STD_TORCH_CHECK(k <= kMostGradColumns, arguments.kernel(), ": weight: expected at most ", kMostGradColumns,
                  " outputs, got ", k);
  const int64_t columns = ceil_divide(p.z.cols, kGradColumns);
  p.pixels = divided(grid, kGradTile, kGradTile / 2, columns, processors);
  p.blocks = static_cast<int>(std::clamp<int64_t>(resident / columns, 1, p.pixels.tiles));
  p.aligned = is_aligned(p.z) && starts_at_16_bytes(p.weight, p.z.cols);
  p.grad_aligned = is_aligned(p.grad);
  p.scaled_width = width_of(p.scaled);
  Tensor partials = torch::stable::new_empty(z, {p.blocks, 2, p.z.cols}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.data_ptr());
  arguments.launched(bn_relu_conv3x3_grad_input(p, arguments.type(), arguments.stream()));
  return partials;
}

// The partial products [ranges, k * 9 * B] of blocks of which `resident` are on the device at once; dz, if given,
// completed in place
Tensor bn_relu_conv3x3_grad_weight_(Tensor grad, Tensor z, Tensor mean, Tensor rstd, Tensor norm_bias,
                                    Optional norm_weight, Grid grid, Optional dz, Optional p_, Optional q, double count,
                                    int64_t resident, int64_t stream) {
  Arguments arguments("bn_relu_conv3x3_grad_weight", z, stream);
  Conv3x3GradWeight p{};
  p.z = arguments.matrix(z, "x");
  check(arguments, grid, p.z.rows);
  const int64_t k = grad.size(1);
  p.grad = arguments.matrix(grad, "grad", p.z.rows, k);
  p.affine = arguments.affine(mean, rstd, norm_bias, norm_weight, p.z.cols);
  STD_TORCH_CHECK(dz.has_value() == p_.has_value() && dz.has_value() == q.has_value(), arguments.kernel(),
                  ": dz, p and q: expected all or none");
  p.aligned = is_aligned(p.z);
  if (dz) {
    p.dz = arguments.matrix(*dz, "dz", p.z.rows, p.z.cols);
    p.p = static_cast<const float*>(arguments.vector(*p_, "p", p.z.cols));
    p.q = static_cast<const float*>(arguments.vector(*q, "q", p.z.cols));
    p.count = count;
    p.aligned = p.aligned && is_aligned(p.dz);
  }
  p.grad_aligned = is_aligned(p.grad);
  p.pixels = pixels(grid[0], grid[1], grid[2], kGradTile);
  const int64_t others = ceil_divide(p.z.cols, kGradColumns) * ceil_divide(k, k <= 16 ? 16 : k <= 32 ? 32 : 48);
  const int64_t ranges =
      std::clamp<int64_t>(resident / others, 1, std::max<int64_t>(p.pixels.tiles / kTilesPerRange, 1));
  p.tiles_each = static_cast<int>(ceil_divide(p.pixels.tiles, ranges));
  p.ranges = static_cast<int>(ceil_divide(p.pixels.tiles, p.tiles_each));
  Tensor partials = torch::stable::new_empty(z, {p.ranges, k * 9 * p.z.cols}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.data_ptr());
  arguments.launched(bn_relu_conv3x3_grad_weight(p, arguments.type(), arguments.stream()));
  return partials;
}

}  // namespace
}  // namespace densenet_fast::cuda

#define AFFINE "Tensor mean, Tensor rstd, Tensor norm_bias, Tensor? norm_weight"

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def(
      "cuda_bn_relu_conv3x3(Tensor z, Tensor? mean, Tensor? rstd, Tensor? norm_bias, Tensor? norm_weight, "
      "Tensor weight, Tensor? bias, int[] grid, Tensor? keep, float keep_scale, Tensor(a!) out, "
      "Tensor(b!)? out_mean, Tensor(c!)? out_var, Tensor(d!)? out_rstd, float eps, int processors, int stream) -> ()");
  m.def("cuda_bn_relu_conv3x3_grad_input(Tensor grad, Tensor z, " AFFINE
        ", Tensor weight, int[] grid, Tensor(a!) scaled, int processors, int resident, int stream) -> Tensor");
  m.def("cuda_bn_relu_conv3x3_grad_weight(Tensor grad, Tensor z, " AFFINE
        ", int[] grid, Tensor(a!)? dz, Tensor? p, Tensor? q, float count, int resident, int stream) -> Tensor");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cuda_bn_relu_conv3x3", TORCH_BOX(&densenet_fast::cuda::bn_relu_conv3x3_));
  m.impl("cuda_bn_relu_conv3x3_grad_input", TORCH_BOX(&densenet_fast::cuda::bn_relu_conv3x3_grad_input_));
  m.impl("cuda_bn_relu_conv3x3_grad_weight", TORCH_BOX(&densenet_fast::cuda::bn_relu_conv3x3_grad_weight_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) { implement(m); }  // to be recorded, or where a GPU is emulated
