// Makes the launches of a plan again on other tensors, whose addresses take the recorded ones' places.
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <optional>

#include "driver.h"
#include "plan.h"
#include "recorder.h"

#ifdef DENSENET_FAST_EMULATED
#include "emulator.h"
#else
extern "C" const char* cudaGetErrorString(int error);
extern "C" int cudaSetDevice(int device);
#endif

namespace densenet_fast::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

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

}  // namespace
}  // namespace densenet_fast::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_fast, m) {
  m.def("cuda_call(int plan, Tensor[] inputs, int stream) -> Tensor[]");
  m.def("cuda_replay(int plan, Tensor[] inputs, Tensor[] outputs, Tensor arena, int stream) -> bool");
#ifdef DENSENET_FAST_EMULATED
  m.def("cuda_emulated() -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_call", TORCH_BOX(&densenet_fast::cuda::call));
  m.impl("cuda_replay", TORCH_BOX(&densenet_fast::cuda::replay));
}
