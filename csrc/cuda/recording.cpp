// Records the launches of a thread as tables for Python, which finds the addresses in their parameters.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "driver.h"
#include "recorder.h"

namespace densenet_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  m.def("cuda_parameters(int function) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_start_recording", TORCH_BOX(&densenet_fast::cuda::start_recording));
  m.impl("cuda_stop_recording", TORCH_BOX(&densenet_fast::cuda::stop_recording));
  m.impl("cuda_parameters", TORCH_BOX(&densenet_fast::cuda::parameters));
}
