// The ops of the CUDA backend: schemas, and from tensors to launches. `stream` is the address of a cudaStream_t of x's
// device, passed in because a CPU-only torch has no function to ask for the current one.
#include <algorithm>
#include <tuple>

#include "arguments.h"

namespace densenet_fast::cuda {
namespace {

using Optional = std::optional<Tensor>;

// The statistics [cols] of what a kernel stores in tiles, if they are asked for
class Statistics {
 public:
  Statistics(Arguments& arguments, const Optional& mean, const Optional& var, const Optional& rstd, double eps,
             int64_t rows, int64_t cols)
      : arguments_(arguments), asked_(mean.has_value()) {
    STD_TORCH_CHECK(asked_ == var.has_value() && asked_ == rstd.has_value(), arguments.kernel(),
                    ": mean, var and rstd: expected all or none");
    combine_.mean = arguments.vector(mean, "mean", cols);
    combine_.var = arguments.vector(var, "var", cols);
    combine_.rstd = arguments.vector(rstd, "rstd", cols);
    combine_.eps = eps;
    combine_.rows = rows;
    combine_.cols = cols;
  }

  // How the kernel divides its work, and where it leaves the tiles' statistics
  template <typename Params>
  void divide(Params& p) {
    p.width = arguments_.width();
    p.tiling = tiling(combine_.rows, combine_.cols, p.width, asked_ ? kReductionBlocks : kElementwiseBlocks);
    if (!asked_) return;
    partials_ = arguments_.partials(p.tiling, combine_.cols);
    p.partials = partials_->data_ptr();
    combine_.partials = p.partials;
    combine_.tiling = p.tiling;
  }

  // After the kernel
  void combine() const {
    if (asked_) arguments_.launched(combine_statistics(combine_, arguments_.type(), arguments_.stream()));
  }

 private:
  Arguments& arguments_;
  bool asked_;
  CombineStatistics combine_{};
  Optional partials_;
};

// out [M, k] = source [N, k, *spatial] * (mask ? keep_scale : 0), and mean, var and rstd [k] of what was stored;
// without an out, of the source
void append_features(Tensor source, Optional mask, double keep_scale, Optional out, Optional mean, Optional var,
                     Optional rstd, double eps, int64_t stream) {
  Arguments arguments("append_features", source, stream);
  const int64_t cols = source.size(1), rows = source.numel() / cols;
  Statistics statistics(arguments, mean, var, rstd, eps, rows, cols);
  Append p{};
  p.source = arguments.strided(source, "source", source.scalar_type(), source.size(1) == 1 || source.stride(1) == 1);
  p.transposed = p.source.column != 1;
  if (mask) {
    STD_TORCH_CHECK(
        mask->dim() == source.dim() && std::equal(mask->sizes().begin(), mask->sizes().end(), source.sizes().begin()),
        "append_features: mask: expected ", shape(source), ", got ", shape(*mask));
    p.mask = arguments.strided(*mask, "mask", ScalarType::Bool, false);
  }
  p.keep_scale = keep_scale;
  p.out = out ? arguments.matrix(*out, "out", rows, cols) : Matrix{nullptr, rows, cols, 0};
  statistics.divide(p);
  arguments.launched(append(p, arguments.type(), arguments.stream()));
  statistics.combine();
}

// out = grad + (p + 2 * q * (x - mean)) / count, [M, n]; count [] float64 on the device, or null for `rows`
void finalise_gradient(Tensor grad, Tensor x, Tensor mean, Tensor p_, Tensor q, Optional count, double rows, Tensor out,
                       int64_t stream) {
  Arguments arguments("finalise_gradient", x, stream);
  Finalise p{};
  p.x = arguments.matrix(x, "x");
  p.grad = arguments.matrix(grad, "grad", p.x.rows, p.x.cols);
  p.out = arguments.matrix(out, "out", p.x.rows, p.x.cols);
  p.mean = arguments.vector(mean, "mean", p.x.cols);
  p.p = arguments.vector(p_, "p", p.x.cols);
  p.q = arguments.vector(q, "q", p.x.cols);
  p.count_tensor = arguments.count(count);
  p.count = rows;
  p.width = arguments.width();
  p.tiling = tiling(p.x.rows, p.x.cols, p.width, kElementwiseBlocks);
  arguments.launched(finalise(p, arguments.type(), arguments.stream()));
}

Pooling pooling(const std::vector<int64_t>& grid, int64_t rows) {
  const int64_t dims = static_cast<int64_t>(grid.size()) - 1;
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "grid: expected one to three spatial sizes, got ", dims);
  Pooling p{};
  int64_t product = grid[0];
  for (int i = 0; i < 3; ++i) {
    const bool given = i + dims >= 3;
    const int64_t size = given ? grid[i + dims - 2] : 1;
    STD_TORCH_CHECK(size > 0 && size <= INT32_MAX - 2, "grid: expected positive sizes, got ", size);
    p.sizes[i] = static_cast<int>(size);
    p.pooled[i] = (p.sizes[i] + 1) / 2;
    if (!given) p.centre += i == 0 ? 9 : 3;
    product *= size;
  }
  STD_TORCH_CHECK(product == rows, "grid: expected the product ", rows, ", got ", product);
  return p;
}

int64_t pooled_rows(const Pooling& p, int64_t images) { return images * p.pooled[0] * p.pooled[1] * p.pooled[2]; }

// Maxima of relu(y) and their positions in their windows, [M', C] each, of x [M, C]; and out_mean, out_var and out_rstd
// [C] of the maxima as stored
std::tuple<Tensor, Tensor> bn_relu_maxpool_(Tensor x, Tensor mean, Tensor rstd, Tensor bias, Optional weight,
                                            std::vector<int64_t> grid, Optional out_mean, Optional out_var,
                                            Optional out_rstd, double eps, int64_t stream) {
  Arguments arguments("bn_relu_maxpool", x, stream);
  MaxPool p{};
  p.x = arguments.matrix(x, "x");
  p.affine = arguments.affine(mean, rstd, bias, weight, p.x.cols);
  p.pooling = pooling(grid, p.x.rows);
  const int64_t rows = pooled_rows(p.pooling, grid[0]);
  Statistics statistics(arguments, out_mean, out_var, out_rstd, eps, rows, p.x.cols);
  Tensor out = arguments.new_matrix(rows, p.x.cols);
  Tensor argmax = torch::stable::new_empty(x, {rows, p.x.cols}, ScalarType::Byte);
  p.out = arguments.matrix(out, "out");
  p.argmax = arguments.bytes(argmax, "argmax", rows, p.x.cols);
  statistics.divide(p);
  arguments.launched(bn_relu_maxpool(p, arguments.type(), arguments.stream()));
  statistics.combine();
  return {out, argmax};
}

// What a backward op is asked for beside scale * D: the gradients through its normalisation, [C] each, and their sums
struct Asked {
  Optional p_before, q_before, p, q, grad_weight, grad_bias, sum_d, sum_dx;
};

// What combines the sums of the tiles
CombineSums combination(const Arguments& arguments, const Affine& affine, const Asked& asked, int64_t cols) {
  STD_TORCH_CHECK(
      asked.p.has_value() == asked.q.has_value() && asked.p_before.has_value() == asked.q_before.has_value(),
      arguments.kernel(), ": p and q: expected both or neither");
  CombineSums c{};
  c.affine = affine;
  c.cols = cols;
  c.sum_d = arguments.vector(asked.sum_d, "sum_d", cols);
  c.sum_dx = arguments.vector(asked.sum_dx, "sum_dx", cols);
  c.reader.p_before = arguments.vector(asked.p_before, "p_before", cols);
  c.reader.q_before = arguments.vector(asked.q_before, "q_before", cols);
  c.reader.p = arguments.vector(asked.p, "p", cols);
  c.reader.q = arguments.vector(asked.q, "q", cols);
  if (asked.grad_weight) {
    c.reader.weight = arguments.any_vector(*asked.grad_weight, "grad_weight", cols);
    c.reader.weight_type = type_of(*asked.grad_weight, arguments.kernel(), "grad_weight");
  }
  if (asked.grad_bias) {
    c.reader.bias = arguments.any_vector(*asked.grad_bias, "grad_bias", cols);
    c.reader.bias_type = type_of(*asked.grad_bias, arguments.kernel(), "grad_bias");
  }
  return c;
}

// scale * D [M, C], and what is asked for
Tensor pool_backward(Arguments& arguments, PoolBackward p, const Asked& asked) {
  CombineSums combine = combination(arguments, p.affine, asked, p.x.cols);
  Tensor out = arguments.new_matrix(p.x.rows, p.x.cols);
  p.out = arguments.matrix(out, "out");
  p.width = arguments.width();
  p.tiling = tiling(p.x.rows, p.x.cols, p.width, kReductionBlocks);
  const Tensor partials = arguments.partials(p.tiling, p.x.cols);
  combine.partials = p.partials = partials.data_ptr();
  combine.tiles = p.tiling.tiles;
  arguments.launched(bn_relu_pool_backward(p, arguments.type(), arguments.stream()));
  arguments.launched(combine_sums(combine, arguments.type(), arguments.stream()));
  return out;
}

// From grad and argmax [M', C]
Tensor bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor mean, Tensor rstd, Tensor bias,
                                Optional weight, std::vector<int64_t> grid, Optional p_before, Optional q_before,
                                Optional p, Optional q, Optional grad_weight, Optional grad_bias, Optional sum_d,
                                Optional sum_dx, int64_t stream) {
  Arguments arguments("bn_relu_maxpool_backward", x, stream);
  PoolBackward b{};
  b.x = arguments.matrix(x, "x");
  b.affine = arguments.affine(mean, rstd, bias, weight, b.x.cols);
  b.pooling = pooling(grid, b.x.rows);
  const int64_t rows = pooled_rows(b.pooling, grid[0]);
  b.grad = arguments.matrix(grad, "grad", rows, b.x.cols);
  b.argmax = arguments.bytes(argmax, "argmax", rows, b.x.cols);
  return pool_backward(arguments, b, {p_before, q_before, p, q, grad_weight, grad_bias, sum_d, sum_dx});
}

int64_t pixels_of(const Tensor& x, int64_t images) {
  STD_TORCH_CHECK(images > 0 && x.dim() == 2 && x.size(0) % images == 0, "images: expected a divisor of x's rows, got ",
                  images, " for ", shape(x));
  return x.size(0) / images;
}

// Means of relu(y) over each image's pixels, [N, C], of x [M, C]
Tensor bn_relu_global_avgpool_(Tensor x, Tensor mean, Tensor rstd, Tensor bias, Optional weight, int64_t images,
                               int64_t stream) {
  Arguments arguments("bn_relu_global_avgpool", x, stream);
  AveragePool p{};
  p.x = arguments.matrix(x, "x");
  p.pixels = pixels_of(x, images);
  p.affine = arguments.affine(mean, rstd, bias, weight, p.x.cols);
  Tensor out = arguments.new_matrix(images, p.x.cols);
  p.out = arguments.matrix(out, "out");
  p.width = arguments.width();
  p.tiling = tiling(p.pixels, p.x.cols, p.width, 1);
  p.tiling.tiles = images;
  p.tiling.tile_rows = p.pixels;
  arguments.launched(bn_relu_global_avgpool(p, arguments.type(), arguments.stream()));
  return out;
}

// From grad [N, C]
Tensor bn_relu_global_avgpool_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor bias, Optional weight,
                                       int64_t images, Optional p_before, Optional q_before, Optional p, Optional q,
                                       Optional grad_weight, Optional grad_bias, Optional sum_d, Optional sum_dx,
                                       int64_t stream) {
  Arguments arguments("bn_relu_global_avgpool_backward", x, stream);
  PoolBackward b{};
  b.x = arguments.matrix(x, "x");
  b.pixels = pixels_of(x, images);
  b.affine = arguments.affine(mean, rstd, bias, weight, b.x.cols);
  b.grad = arguments.matrix(grad, "grad", images, b.x.cols);
  return pool_backward(arguments, b, {p_before, q_before, p, q, grad_weight, grad_bias, sum_d, sum_dx});
}

}  // namespace
}  // namespace densenet_fast::cuda

#define AFFINE "Tensor mean, Tensor rstd, Tensor bias, Tensor? weight"
#define ASKED                                                                                   \
  "Tensor? p_before, Tensor? q_before, Tensor(a!)? p, Tensor(b!)? q, Tensor(c!)? grad_weight, " \
  "Tensor(d!)? grad_bias, Tensor(e!)? sum_d, Tensor(f!)? sum_dx"

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def(
      "cuda_append_features(Tensor source, Tensor? mask, float keep_scale, Tensor(a!)? out, Tensor(b!)? mean, "
      "Tensor(c!)? var, Tensor(d!)? rstd, float eps, int stream) -> ()");
  m.def(
      "cuda_finalise_gradient(Tensor grad, Tensor x, Tensor mean, Tensor p, Tensor q, Tensor? count, float rows, "
      "Tensor(a!) out, int stream) -> ()");
  m.def("cuda_bn_relu_maxpool(Tensor x, " AFFINE
        ", int[] grid, Tensor(a!)? out_mean, Tensor(b!)? out_var, Tensor(c!)? out_rstd, float eps, int stream) -> "
        "(Tensor, Tensor)");
  m.def("cuda_bn_relu_maxpool_backward(Tensor grad, Tensor argmax, Tensor x, " AFFINE ", int[] grid, " ASKED
        ", int stream) -> Tensor");
  m.def("cuda_bn_relu_global_avgpool(Tensor x, " AFFINE ", int images, int stream) -> Tensor");
  m.def("cuda_bn_relu_global_avgpool_backward(Tensor grad, Tensor x, " AFFINE ", int images, " ASKED
        ", int stream) -> Tensor");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cuda_append_features", TORCH_BOX(&densenet_fast::cuda::append_features));
  m.impl("cuda_finalise_gradient", TORCH_BOX(&densenet_fast::cuda::finalise_gradient));
  m.impl("cuda_bn_relu_maxpool", TORCH_BOX(&densenet_fast::cuda::bn_relu_maxpool_));
  m.impl("cuda_bn_relu_maxpool_backward", TORCH_BOX(&densenet_fast::cuda::bn_relu_maxpool_backward));
  m.impl("cuda_bn_relu_global_avgpool", TORCH_BOX(&densenet_fast::cuda::bn_relu_global_avgpool_));
  m.impl("cuda_bn_relu_global_avgpool_backward", TORCH_BOX(&densenet_fast::cuda::bn_relu_global_avgpool_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) { implement(m); }  // to be recorded, or where a GPU is emulated
