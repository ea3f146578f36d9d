// The ops for the small work on vectors and weights: schemas, and from lists of tensors to launches of up to 64 jobs.
#include <algorithm>
#include <bit>
#include <cmath>

#include "arguments.h"

namespace densenet_fast::cuda {
namespace {

using Tensors = std::vector<Tensor>;

int32_t small(int64_t value, const char* kernel, const char* name) {
  STD_TORCH_CHECK(0 <= value && value <= INT32_MAX, kernel, ": ", name, ": expected less than 2^31 elements");
  return static_cast<int32_t>(value);
}

// Whether the memory of t [k, columns, *taps] is [k, *taps, columns]
bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3 || (t.size(1) > 1 && t.stride(1) != 1)) return false;
  int64_t expected = t.size(1);
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// What makes a target, and where its source stands
class Jobs {
 public:
  Jobs(const Tensor& target, int64_t stream) : arguments_("prepare", target, stream) {}

  void add(Making making, const Tensor& target, const Tensor* source, double eps) {
    if (target.numel() == 0) return;
    Job& job = p_.jobs[count_];
    job = {};
    job.making = making;
    job.eps = eps;
    job.target_type = type(target, "target");
    job.target = target.data_ptr();
    job.channels_last = !target.is_contiguous();
    STD_TORCH_CHECK(!job.channels_last || is_channels_last(target),
                    "prepare: target: expected contiguous or channels last memory, got ", shape(target));
    job.k = job.columns = job.taps[0] = job.taps[1] = job.taps[2] = 1;
    if (source == nullptr) {
      job.k = small(target.numel(), "prepare", "target");
      job.channels_last = false;
    } else {
      take_source(job, target, *source);
    }
    if (++count_ == kJobs) launch();
  }

  void launch() {
    if (count_ > 0) arguments_.launched(prepare(p_, count_, arguments_.stream()));
    count_ = 0;
  }

 private:
  Type type(const Tensor& t, const char* name) const {
    arguments_.check_device(t, name);
    return type_of(t, "prepare", name);
  }

  void take_source(Job& job, const Tensor& target, const Tensor& source) const {
    job.source_type = type(source, "source");
    job.source = source.data_ptr();
    STD_TORCH_CHECK(source.dim() <= 5 && source.dim() == target.dim() &&
                        std::equal(source.sizes().begin(), source.sizes().end(), target.sizes().begin()),
                    "prepare: source: expected ", shape(target), " of up to 5 dimensions, got ", shape(source));
    for (int64_t d = 0; d < source.dim(); ++d) {
      const int64_t size = source.size(d);
      if (size > 1) job.strides[d] = small(source.stride(d), "prepare", "source");
      STD_TORCH_CHECK(d < 2 || size <= UINT8_MAX, "prepare: source: expected up to 255 taps along a dimension, got ",
                      shape(source));
      if (d == 0) job.k = small(size, "prepare", "source");
      if (d == 1) job.columns = small(size, "prepare", "source");
      if (d > 1) job.taps[d - 2] = static_cast<uint8_t>(size);
    }
  }

  Arguments arguments_;
  Prepare p_{};
  int count_ = 0;
};

// copies = sources, rstds = 1 / sqrt(variances + eps), zeros = 0
void prepare_(Tensors sources, Tensors copies, Tensors variances, Tensors rstds, std::vector<double> eps, Tensors zeros,
              int64_t stream) {
  STD_TORCH_CHECK(sources.size() == copies.size(), "prepare: sources: expected one for each copy");
  STD_TORCH_CHECK(variances.size() == rstds.size() && eps.size() == rstds.size(),
                  "prepare: variances and eps: expected one for each rstd");
  const Tensor* first = nullptr;
  for (const Tensors* targets : {&copies, &rstds, &zeros})
    for (const Tensor& t : *targets)
      if (first == nullptr && t.numel() > 0) first = &t;
  if (first == nullptr) return;
  Jobs jobs(*first, stream);
  for (size_t i = 0; i < copies.size(); ++i) jobs.add(Making::copy, copies[i], &sources[i], 0);
  for (size_t i = 0; i < rstds.size(); ++i) {
    const ScalarType dtype = rstds[i].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "prepare: target: expected float32 or float64 for an rstd");
    jobs.add(Making::rstd, rstds[i], &variances[i], eps[i]);
  }
  for (const Tensor& zero : zeros) jobs.add(Making::zero, zero, nullptr, 0);
  jobs.launch();
}

// running = running + momentum * (batch - running) for each normalisation, its batch statistics from its start on in
// the mean and var [packed] of its table. `vectors` are the addresses of running means and variances by turns,
// `counters` of counters, and each row of a table (start, columns, mean's type, var's type, momentum's bits, whether it
// has a counter). A normalisation that comes again waits for the next launch.
void update_running_statistics_(std::vector<int64_t> vectors, std::vector<int64_t> counters, std::vector<Tensor> tables,
                                std::vector<Tensor> means, std::vector<Tensor> variances,
                                std::vector<std::optional<Tensor>> counts, std::vector<double> rows, int64_t stream) {
  const char* kernel = "update_running_statistics";
  const size_t n = tables.size();
  STD_TORCH_CHECK(n > 0 && means.size() == n && variances.size() == n && counts.size() == n && rows.size() == n, kernel,
                  ": expected as many means, variances, counts and rows as tables, at least one");
  Arguments arguments(kernel, means[0], stream);
  UpdateRunning p{};
  int made = 0, batches = 0;
  const auto launch = [&] {
    if (made > 0) arguments.launched(update_running_statistics(p, made, arguments.type(), arguments.stream()));
    made = 0;
  };
  auto vector = vectors.begin();
  auto counter = counters.begin();
  for (size_t k = 0; k < n; ++k) {
    const Tensor &table = tables[k], &mean = means[k];
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 6 && table.scalar_type() == ScalarType::Long &&
                        table.is_contiguous() && !table.is_cuda(),
                    kernel, ": table: expected contiguous int64 [n, 6] on the CPU, got ", shape(table));
    if (batches == kBatches) launch(), batches = 0;
    p.batches[batches++] = {arguments.vector(mean, "mean", mean.numel()),
                            arguments.vector(variances[k], "var", mean.numel()), arguments.count(counts[k]), rows[k]};
    const auto* row = static_cast<const int64_t*>(table.data_ptr());
    for (int64_t i = 0; i < table.size(0); ++i, row += 6) {
      const auto [start, cols, mean_type, var_type, momentum, counted] = *reinterpret_cast<const int64_t (*)[6]>(row);
      STD_TORCH_CHECK(0 <= start && 0 <= cols && start + cols <= mean.numel(), kernel, ": start: expected ", cols,
                      " columns from it on in ", shape(mean), ", got ", start);
      STD_TORCH_CHECK(vectors.end() - vector >= 2 && (!counted || counter != counters.end()), kernel,
                      ": vectors or counters: too few");
      Running r{reinterpret_cast<void*>(vector[0]), reinterpret_cast<void*>(vector[1]),
                counted ? reinterpret_cast<int64_t*>(*counter++) : nullptr, std::bit_cast<double>(momentum)};
      vector += 2;
      r.start = small(start, kernel, "start");
      r.cols = small(cols, kernel, "running mean");
      r.mean_type = static_cast<Type>(mean_type);
      r.var_type = static_cast<Type>(var_type);
      r.batch = static_cast<unsigned char>(batches - 1);
      const bool again = std::any_of(p.running, p.running + made, [&](const Running& other) {
        return other.mean == r.mean || (r.batches != nullptr && other.batches == r.batches);
      });
      if (again || made == kRunning) launch();
      p.running[made++] = r;
    }
  }
  launch();
}

}  // namespace
}  // namespace densenet_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def(
      "cuda_prepare(Tensor[] sources, Tensor(a!)[] copies, Tensor[] variances, Tensor(b!)[] rstds, float[] eps, "
      "Tensor(c!)[] zeros, int stream) -> ()");
  m.def(
      "cuda_update_running_statistics(int[] vectors, int[] counters, Tensor[] tables, Tensor[] means, "
      "Tensor[] variances, Tensor?[] counts, float[] rows, int stream) -> ()");
}

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cuda_prepare", TORCH_BOX(&densenet_fast::cuda::prepare_));
  m.impl("cuda_update_running_statistics", TORCH_BOX(&densenet_fast::cuda::update_running_statistics_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) { implement(m); }  // to be recorded, or where a GPU is emulated
