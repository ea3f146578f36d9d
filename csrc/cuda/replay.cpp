// Launches recorded once and made again on other tensors. A plan holds them in order: each with its parameters' bytes
// and the places in them where addresses stand, which a replay computes from the tensors it is given.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <sstream>
#include <tuple>
#include <unordered_map>

#include "driver.h"
#include "recorder.h"

#ifdef DENSENET_FAST_EMULATED
#include "emulator.h"
#else
extern "C" int cudaGetFuncBySymbol(void** function, const void* symbol);
extern "C" const char* cudaGetErrorString(int error);
extern "C" int cudaSetDevice(int device);
#endif

namespace densenet_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

uint64_t address_of(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); }

int32_t dtype_of(const Tensor& t) {  // as torch numbers them
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

int device_of(const Tensor& t) { return t.is_cuda() ? t.get_device_index() : -1; }  // -1 for a CPU

// Uninitialised
Tensor new_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int device) {
  AtenTensorHandle made;
  const int32_t type = device < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, type, device < 0 ? 0 : device, &made));
  return Tensor(made);
}

// All of a tensor that a plan depends on but its sizes and strides, which stand with those of others
struct Form {
  int32_t dtype, device, alignment, dims;
};

// Of several tensors, in order. What a call looks at stands together: few of a plan's thousands of numbers would still
// be in a cache.
class Forms {
 public:
  void add(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    forms_.push_back({dtype_of(t), device_of(t), alignment(address_of(t)), static_cast<int32_t>(t.dim())});
    numbers_.insert(numbers_.end(), sizes.begin(), sizes.end());
    numbers_.insert(numbers_.end(), strides.begin(), strides.end());
  }

  size_t size() const { return forms_.size(); }

  // Appends the tensors' addresses; whether they are all as these
  bool fit(const std::vector<Tensor>& tensors, std::vector<uint64_t>& addresses) const {
    if (tensors.size() != size()) return false;
    const int64_t* number = numbers_.data();
    for (size_t i = 0; i < size(); ++i) {
      const Tensor& t = tensors[i];
      const Form& f = forms_[i];
      addresses.push_back(address_of(t));
      if (t.dim() != f.dims || dtype_of(t) != f.dtype || device_of(t) != f.device ||
          alignment(addresses.back()) != f.alignment || !std::equal(number, number + f.dims, t.sizes().begin()) ||
          !std::equal(number + f.dims, number + 2 * f.dims, t.strides().begin()))
        return false;
      number += 2 * f.dims;
    }
    return true;
  }

  // Appends uninitialised tensors on a device that are as these are elsewhere
  void allocate(int device, std::vector<Tensor>& made) const {
    const int64_t* number = numbers_.data();
    for (const Form& f : forms_) {
      made.push_back(new_tensor(f.dims, number, number + f.dims, f.dtype, device));
      number += 2 * f.dims;
    }
  }

 private:
  static int32_t alignment(uint64_t address) { return static_cast<int32_t>(address % 16); }

  std::vector<Form> forms_;
  std::vector<int64_t> numbers_;
};

struct Relocation {
  int32_t at, buffer;
  int64_t offset;
};

struct Step {
  const void* function;  // the driver's, or the host's where it is emulated
  unsigned grid[3], block[3];
  size_t shared;
  bool emulated;
  std::span<const unsigned char> parameters;
  std::span<const int32_t> arguments;  // where in the parameters each argument starts
  std::span<const Relocation> relocations;
};

struct Plan {
  int device;
  int64_t arena;    // bytes
  int64_t buffers;  // inputs, outputs, and the arena
  Forms inputs, outputs;
  std::vector<Step> steps;
  std::vector<std::string> names;  // of the steps' kernels
  std::vector<unsigned char> parameters;
  std::vector<int32_t> arguments;
  std::vector<Relocation> relocations;
};

// What a launch needs while it is made
struct Scratch {
  std::vector<unsigned char> bytes;
  std::vector<void*> arguments;
};

// What went wrong, or empty
std::string run(const Step& step, const std::vector<uint64_t>& buffers, void* stream, Scratch& scratch) {
  auto& [bytes, arguments] = scratch;
  bytes.assign(step.parameters.begin(), step.parameters.end());
  for (const Relocation& r : step.relocations) {
    const uint64_t address = buffers[r.buffer] + r.offset;
    std::memcpy(bytes.data() + r.at, &address, sizeof(address));
  }
  const auto& [function, grid, block, shared, emulated, _1, _2, _3] = step;
#ifdef DENSENET_FAST_EMULATED
  if (emulated && recorder != nullptr) {
    recorder->push_back({function, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, bytes});
    return "";
  }
  if (emulated) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    const char* error = run_grid(function, grid, block, shared, bytes.data());
    return error ? error : "";
  }
#endif
  arguments.clear();
  for (const int32_t at : step.arguments) arguments.push_back(bytes.data() + at);
  const Driver& driver = Driver::get();
  const int error = driver.launch(const_cast<void*>(function), grid, block, shared, stream, arguments.data());
  return error == 0 ? "" : driver.message(error);
}

class Plans {
 public:
  int64_t add(Plan plan) {
    const std::lock_guard lock(mutex_);
    plans_.emplace(++last_, std::make_shared<const Plan>(std::move(plan)));
    return last_;
  }
  std::shared_ptr<const Plan> find(int64_t key) {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(key);
    STD_TORCH_CHECK(found != plans_.end(), "cuda_replay: there is no plan ", key);
    return found->second;
  }
  void remove(int64_t key) {
    const std::lock_guard lock(mutex_);
    plans_.erase(key);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans_;
  int64_t last_ = 0;
};

Plans& plans() {
  static Plans all;
  return all;
}

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

thread_local std::vector<Recorded> launches_of_thread;

void start_recording() {
  STD_TORCH_CHECK(recorder == nullptr, "cuda_start_recording: this thread records already");
  launches_of_thread.clear();
  recorder = &launches_of_thread;
}

Tensor new_table(int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::empty({rows, columns}, dtype);
}

// [launches, 9]: function, grid, block, shared bytes, bytes of parameters; and the parameters [1, bytes], one behind
// another
std::tuple<Tensor, Tensor> stop_recording() {
  recorder = nullptr;
  const std::vector<Recorded> launches = std::move(launches_of_thread);
  int64_t bytes = 0;
  for (const Recorded& r : launches) bytes += static_cast<int64_t>(r.parameters.size());
  Tensor table = new_table(static_cast<int64_t>(launches.size()), 9, ScalarType::Long);
  Tensor parameters = new_table(1, bytes, ScalarType::Byte);
  auto* number = static_cast<int64_t*>(table.data_ptr());
  auto* byte = static_cast<unsigned char*>(parameters.data_ptr());
  for (const Recorded& r : launches) {
    *number++ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.function));
    for (const unsigned size : r.grid) *number++ = size;
    for (const unsigned size : r.block) *number++ = size;
    *number++ = static_cast<int64_t>(r.shared);
    *number++ = static_cast<int64_t>(r.parameters.size());
    byte = std::copy(r.parameters.begin(), r.parameters.end(), byte);
  }
  return {table, parameters};
}

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

// The inputs' addresses, with room for those of all buffers; none where an input is not as planned
std::vector<uint64_t> addresses(const Plan& plan, const std::vector<Tensor>& inputs) {
  std::vector<uint64_t> found;
  found.reserve(plan.buffers);
  if (!plan.inputs.fit(inputs, found)) found.clear();
  return found;
}

// With the addresses of the inputs in `buffers`
void launch_all(const Plan& plan, std::vector<uint64_t> buffers, const std::vector<Tensor>& outputs,
                const Tensor& arena, int64_t stream) {
#ifndef DENSENET_FAST_EMULATED
  // A thread that has called nothing of the runtime yet has no context, which the driver's functions need.
  const int error = plan.device < 0 ? 0 : cudaSetDevice(plan.device);
  STD_TORCH_CHECK(error == 0, "densenet_fast: device ", plan.device, ": ", cudaGetErrorString(error));
#endif
  for (const Tensor& t : outputs) buffers.push_back(address_of(t));
  buffers.push_back(address_of(arena));
  Scratch scratch;
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const std::string error = run(plan.steps[i], buffers, reinterpret_cast<void*>(stream), scratch);
    STD_TORCH_CHECK(error.empty(), "densenet_fast: the kernel ", plan.names[i], ": ", error);
  }
}

// Launches a plan on `stream`, a cudaStream_t of the inputs' device, where they are as planned: its outputs, allocated
// here; none where an input is not
std::vector<Tensor> call(int64_t key, std::vector<Tensor> inputs, int64_t stream) {
  const std::shared_ptr<const Plan> plan = plans().find(key);
  std::vector<Tensor> outputs;
  std::vector<uint64_t> buffers = addresses(*plan, inputs);
  if (buffers.empty()) return outputs;
  std::optional<DeviceGuard> guard;
  if (plan->device >= 0) guard.emplace(plan->device);
  outputs.reserve(plan->outputs.size());
  plan->outputs.allocate(plan->device, outputs);
  const int64_t one = 1;
  const Tensor arena = new_tensor(1, &plan->arena, &one, aoti_torch_dtype_uint8(), plan->device);
  launch_all(*plan, std::move(buffers), outputs, arena, stream);
  return outputs;
}

// The same with given outputs and arena; whether the inputs are as planned
bool replay(int64_t key, std::vector<Tensor> inputs, std::vector<Tensor> outputs, Tensor arena, int64_t stream) {
  const std::shared_ptr<const Plan> plan = plans().find(key);
  std::vector<uint64_t> buffers = addresses(*plan, inputs);
  if (buffers.empty()) return false;
  STD_TORCH_CHECK(outputs.size() == plan->outputs.size(), "cuda_replay: outputs: expected ", plan->outputs.size(),
                  ", got ", outputs.size());
  std::optional<DeviceGuard> guard;
  if (plan->device >= 0) guard.emplace(plan->device);
  launch_all(*plan, std::move(buffers), outputs, arena, stream);
  return true;
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

// (offset, size) of each parameter of a function of the driver; none if it cannot tell
Tensor parameters(int64_t function) {
  std::vector<size_t> found;
  void* const handle = reinterpret_cast<void*>(function);
  size_t offset, size;
  while (Driver::get().parameter(handle, found.size() / 2, &offset, &size)) found.insert(found.end(), {offset, size});
  Tensor table = new_table(static_cast<int64_t>(found.size() / 2), 2, ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(table.data_ptr()));
  return table;
}

}  // namespace
}  // namespace densenet_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def("cuda_start_recording() -> ()");
  m.def("cuda_stop_recording() -> (Tensor, Tensor)");
  m.def(
      "cuda_plan(Tensor[] inputs, Tensor[] outputs, int arena, Tensor launches, Tensor arguments, Tensor relocations, "
      "Tensor parameters, str names) -> int");
  m.def("cuda_call(int plan, Tensor[] inputs, int stream) -> Tensor[]");
  m.def("cuda_replay(int plan, Tensor[] inputs, Tensor[] outputs, Tensor arena, int stream) -> bool");
  m.def("cuda_forget_plan(int plan) -> ()");
  m.def("cuda_signature(Tensor[] inputs) -> int");
  m.def("cuda_parameters(int function) -> Tensor");
#ifdef DENSENET_FAST_EMULATED
  m.def("cuda_emulated() -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_start_recording", TORCH_BOX(&densenet_fast::cuda::start_recording));
  m.impl("cuda_stop_recording", TORCH_BOX(&densenet_fast::cuda::stop_recording));
  m.impl("cuda_plan", TORCH_BOX(&densenet_fast::cuda::plan));
  m.impl("cuda_call", TORCH_BOX(&densenet_fast::cuda::call));
  m.impl("cuda_replay", TORCH_BOX(&densenet_fast::cuda::replay));
  m.impl("cuda_forget_plan", TORCH_BOX(&densenet_fast::cuda::forget_plan));
  m.impl("cuda_signature", TORCH_BOX(&densenet_fast::cuda::signature));
  m.impl("cuda_parameters", TORCH_BOX(&densenet_fast::cuda::parameters));
}
