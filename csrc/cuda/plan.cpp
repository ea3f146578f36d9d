// Makes a plan from the tables that Python wrote of recorded launches, and keeps it.
#include "plan.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <sstream>
#include <utility>

#include "driver.h"
#include "recorder.h"

#ifndef DENSENET_FAST_EMULATED
extern "C" int cudaGetFuncBySymbol(void** function, const void* symbol);
extern "C" const char* cudaGetErrorString(int error);
#endif

namespace densenet_fast::cuda {

Plans& plans() {
  static Plans all;
  return all;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

// The numbers of a table that was made in Python: int64 [rows, columns], contiguous, on the CPU
class Table {
 public:
  Table(const Tensor& t, int64_t columns, const char* name)
      : next_(static_cast<const int64_t*>(t.data_ptr())), end_(next_ + t.numel()), name_(name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && !t.is_cuda() && t.dim() == 2 &&
                        t.size(1) == columns,
                    "cuda_plan: ", name, ": expected a contiguous int64 table of ", columns, " columns on the CPU");
  }
  bool finished() const { return next_ == end_; }
  int64_t next() {
    STD_TORCH_CHECK(!finished(), "cuda_plan: ", name_, ": too few rows");
    return *next_++;
  }

 private:
  const int64_t *next_, *end_;
  const char* name_;
};

// The driver's function of a kernel of this library, on the current device, for blocks of so much shared memory
const void* function_of(const void* symbol, size_t shared, const std::string& name) {
#ifdef DENSENET_FAST_EMULATED
  return symbol;
#else
  void* function = nullptr;
  int error = cudaGetFuncBySymbol(&function, symbol);
  STD_TORCH_CHECK(error == 0, "densenet_fast: the CUDA kernel ", name, ": ", cudaGetErrorString(error));
  const Driver& driver = Driver::get();
  if (shared > kSharedBytes && driver.missing().empty()) error = driver.allow_shared(function, shared);
  STD_TORCH_CHECK(error == 0, "densenet_fast: the CUDA kernel ", name, ": ", driver.message(error));
  return function;
#endif
}

int32_t small(int64_t number) {
  STD_TORCH_CHECK(std::in_range<int32_t>(number), "cuda_plan: ", number, " is too large");
  return static_cast<int32_t>(number);
}

// The first `count` of those that are left
template <typename T>
std::span<T> taken(std::span<T>& left, int64_t count, const char* name) {
  STD_TORCH_CHECK(0 <= count && std::cmp_less_equal(count, left.size()), "cuda_plan: ", name, ": too few");
  const std::span<T> found = left.first(static_cast<size_t>(count));
  left = left.subspan(static_cast<size_t>(count));
  return found;
}

// Keeps a plan for tensors like `inputs` and `outputs` and an arena of bytes, which its relocations number in this
// order; the arguments' offsets, relocations (offset in the parameters, buffer, offset in the buffer) and parameters of
// all launches stand one behind another, their names a line each. A launch is (whether of this library, function, grid,
// block, shared bytes, bytes of parameters, arguments, relocations).
int64_t plan(std::vector<Tensor> inputs, std::vector<Tensor> outputs, int64_t arena, Tensor launches, Tensor arguments,
             Tensor relocations, Tensor parameters, std::string names) {
  STD_TORCH_CHECK(!inputs.empty(), "cuda_plan: inputs: expected at least one tensor");
  STD_TORCH_CHECK(parameters.scalar_type() == ScalarType::Byte && parameters.is_contiguous(),
                  "cuda_plan: parameters: expected contiguous bytes");
  Plan made{device_of(inputs[0]), arena, static_cast<int64_t>(inputs.size() + outputs.size()) + 1};
  std::optional<DeviceGuard> guard;
  if (made.device >= 0) guard.emplace(made.device);
  for (const Tensor& t : inputs) made.inputs.add(t);
  for (const Tensor& t : outputs) made.outputs.add(t);
  Table launch(launches, 12, "launches"), argument(arguments, 1, "arguments"),
      relocation(relocations, 3, "relocations");
  const auto* byte = static_cast<const unsigned char*>(parameters.data_ptr());
  made.parameters.assign(byte, byte + parameters.numel());
  made.arguments.resize(arguments.numel());
  made.relocations.resize(relocations.numel() / 3);
  std::span<unsigned char> bytes_left(made.parameters);
  std::span<int32_t> arguments_left(made.arguments);
  std::span<Relocation> relocations_left(made.relocations);
  std::istringstream lines(names);
  while (!launch.finished()) {
    Step step{};
    std::string& name = made.names.emplace_back();
    std::getline(lines, name);
    const bool own = launch.next() != 0;
    step.function = reinterpret_cast<const void*>(static_cast<uintptr_t>(launch.next()));
    for (unsigned& size : step.grid) size = static_cast<unsigned>(launch.next());
    for (unsigned& size : step.block) size = static_cast<unsigned>(launch.next());
    step.shared = static_cast<size_t>(launch.next());
    step.parameters = taken(bytes_left, launch.next(), "parameters");
    const auto bytes = static_cast<int64_t>(step.parameters.size());
    const std::span<int32_t> starts = taken(arguments_left, launch.next(), "arguments");
    for (int32_t& at : starts) {
      at = small(argument.next());
      STD_TORCH_CHECK(0 <= at && at < bytes, "cuda_plan: arguments: ", at, " of ", bytes, " bytes");
    }
    const std::span<Relocation> moves = taken(relocations_left, launch.next(), "relocations");
    for (Relocation& each : moves) {
      each = {small(relocation.next()), small(relocation.next()), relocation.next()};
      STD_TORCH_CHECK(0 <= each.at && each.at + 8 <= bytes && 0 <= each.buffer && each.buffer < made.buffers,
                      "cuda_plan: relocations: ", each.at, " of ", bytes, " bytes, buffer ", each.buffer);
    }
    step.arguments = starts, step.relocations = moves;
#ifdef DENSENET_FAST_EMULATED
    step.emulated = own;
#endif
    if (own) step.function = function_of(step.function, step.shared, name);
    if (!step.emulated)
      STD_TORCH_CHECK(Driver::get().missing().empty(),
                      "densenet_fast: launches cannot be replayed: ", Driver::get().missing());
    made.steps.push_back(step);
  }
  return plans().add(std::move(made));
}

void forget_plan(int64_t key) { plans().remove(key); }

// Equal for tensors that fit the same plans; unequal ones may share it
int64_t signature(std::vector<Tensor> inputs) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&hash](uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 29;
  };
  for (const Tensor& t : inputs) {
    mix(static_cast<uint64_t>(dtype_of(t)) << 32 | static_cast<uint32_t>(device_of(t)));
    mix(address_of(t) % 16);
    for (const int64_t size : t.sizes()) mix(size);
    for (const int64_t stride : t.strides()) mix(stride);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace densenet_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def(
      "cuda_plan(Tensor[] inputs, Tensor[] outputs, int arena, Tensor launches, Tensor arguments, Tensor relocations, "
      "Tensor parameters, str names) -> int");
  m.def("cuda_forget_plan(int plan) -> ()");
  m.def("cuda_signature(Tensor[] inputs) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&densenet_fast::cuda::plan));
  m.impl("cuda_forget_plan", TORCH_BOX(&densenet_fast::cuda::forget_plan));
  m.impl("cuda_signature", TORCH_BOX(&densenet_fast::cuda::signature));
}
