// A launch plan: launches in order, each with its parameters' bytes and the places in them where addresses stand; and
// the tensors that it fits.
//
//   const int64_t key = plans().add(std::move(plan));             // plan.cpp, from what recording.cpp wrote down
//   std::vector<uint64_t> addresses;
//   if (plans().find(key)->inputs.fit(inputs, addresses)) { ... }  // replay.cpp makes the launches again
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace densenet_fast::cuda {

using torch::stable::Tensor;

inline uint64_t address_of(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); }

inline int32_t dtype_of(const Tensor& t) {  // as torch numbers them
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline int device_of(const Tensor& t) { return t.is_cuda() ? t.get_device_index() : -1; }  // -1 for a CPU

// Uninitialised
inline Tensor new_tensor(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int device) {
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

// Of this process
Plans& plans();

}  // namespace densenet_fast::cuda
