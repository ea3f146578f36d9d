// The functions of CUDA's driver that launch kernels, looked up in the process: the library is linked with none.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <string>

namespace densenet_fast::cuda {

class Driver {
 public:
  // The loaded one, or the library that the environment variable DENSENET_FAST_LIBCUDA names
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  // What kept it from being used, or empty
  const std::string& missing() const { return missing_; }

  // cuLaunchKernel(function, grid, block, shared bytes, stream, the parameters' addresses, null)
  int launch(void* function, const unsigned (&grid)[3], const unsigned (&block)[3], size_t shared, void* stream,
             void** parameters) const {
    return launch_(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], static_cast<unsigned>(shared),
                   stream, parameters, nullptr);
  }

  // Lets blocks of the function have so many bytes of shared memory
  int allow_shared(void* function, size_t bytes) const {
    constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return set_attribute_(function, kMaxDynamicSharedBytes, static_cast<int>(bytes));
  }

  // Whether the function has a parameter `index`, and where it stands in the parameters; false too where the driver is
  // too old to tell
  bool parameter(void* function, size_t index, size_t* offset, size_t* size) const {
    return parameter_ != nullptr && parameter_(function, index, offset, size) == 0;
  }

  std::string message(int error) const {
    const char* text = nullptr;
    return describe_ != nullptr && describe_(error, &text) == 0 && text ? text : "error " + std::to_string(error);
  }

 private:
  Driver() {
    const char* path = std::getenv("DENSENET_FAST_LIBCUDA");
    void* library = dlopen(path ? path : "libcuda.so.1", RTLD_LAZY);
    if (library == nullptr) {
      missing_ = dlerror();
      return;
    }
    find(library, "cuLaunchKernel", &launch_);
    find(library, "cuFuncSetAttribute", &set_attribute_);
    find(library, "cuFuncGetParamInfo", &parameter_);
    find(library, "cuGetErrorString", &describe_);
    if (launch_ == nullptr || set_attribute_ == nullptr)
      missing_ = "the driver has no cuLaunchKernel or no cuFuncSetAttribute";
  }

  template <typename Function>
  static void find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
  }

  int (*launch_)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                 void**) = nullptr;
  int (*set_attribute_)(void*, int, int) = nullptr;
  int (*parameter_)(void*, size_t, size_t*, size_t*) = nullptr;
  int (*describe_)(int, const char**) = nullptr;
  std::string missing_;
};

}  // namespace densenet_fast::cuda
