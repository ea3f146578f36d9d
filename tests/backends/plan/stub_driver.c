// A driver of CUDA for a GPU that is not there: writes down what is launched
// and launches nothing.
//
// What a function's parameters are it reads from the compiled code, as the
// driver does.
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { kParameters = 64, kLaunches = 65536, kBytes = 512 };

typedef struct {
  char name[256];
  size_t count, offsets[kParameters], sizes[kParameters];
} Function;

typedef struct {
  Function *function;
  unsigned grid[3], block[3], shared;
  void *stream;
  size_t bytes;
  unsigned char data[kBytes];
} Launch;

static Launch launches[kLaunches];
static int launched = 0, failing = 0, silent = 0, context;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// For tests

int stub_launched(void) { return launched; }
const Launch *stub_launch(int i) { return &launches[i]; }
void stub_clear(void) { launched = 0; }
void stub_fail(int on) { failing = on; }   // every launch
void stub_silence(int on) { silent = on; } // about parameters

// What launches

static CUresult record(Function *function, const unsigned *grid,
                       const unsigned *block, unsigned shared, void *stream,
                       void **parameters) {
  if (failing)
    return CUDA_ERROR_LAUNCH_FAILED;
  pthread_mutex_lock(&mutex);
  Launch *made = &launches[launched];
  *made = (Launch){function,
                   {grid[0], grid[1], grid[2]},
                   {block[0], block[1], block[2]},
                   shared,
                   stream,
                   0,
                   {0}};
  for (size_t i = 0; i < function->count; ++i) {
    memcpy(made->data + function->offsets[i], parameters[i],
           function->sizes[i]);
    made->bytes = function->offsets[i] + function->sizes[i];
  }
  if (launched + 1 < kLaunches)
    ++launched;
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz,
                        unsigned bx, unsigned by, unsigned bz, unsigned shared,
                        CUstream stream, void **parameters, void **extra) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  return record((Function *)f, grid, block, shared, stream, parameters);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f,
                          void **parameters, void **extra) {
  if (c->numAttrs)
    return CUDA_ERROR_NOT_SUPPORTED;
  const unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ},
                 block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return record((Function *)f, grid, block, c->sharedMemBytes, c->hStream,
                parameters);
}

// The parameters in the section .nv.info.<kernel> of a cubin: entries of a
// format, a kind and a value
static void read_parameters(const char *image, Function *function) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof(wanted), ".nv.info.%s", function->name);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted))
      continue;
    const unsigned char *entry =
        (const unsigned char *)image + sections[i].sh_offset;
    const unsigned char *end = entry + sections[i].sh_size;
    while (entry < end) {
      uint16_t length = 0, place[2];
      uint32_t bits;
      if (entry[0] == 4)
        memcpy(&length, entry + 2, 2);
      if (entry[0] == 4 &&
          entry[1] ==
              0x17) { // index, ordinal and offset, size among other bits
        memcpy(place, entry + 8, 4);
        memcpy(&bits, entry + 12, 4);
        function->offsets[place[0]] = place[1];
        function->sizes[place[0]] = bits >> 18;
        if (function->count < place[0] + 1u)
          function->count = place[0] + 1u;
      }
      entry += 4 + length;
    }
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof(Function));
  snprintf(made->name, sizeof(made->name), "%s", name);
  read_parameters((const char *)module, made);
  *f = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t *offset,
                            size_t *size) {
  const Function *function = (const Function *)f;
  if (silent || index >= function->count)
    return CUDA_ERROR_INVALID_VALUE;
  *offset = function->offsets[index];
  *size = function->sizes[index];
  return CUDA_SUCCESS;
}

// The rest of what Triton asks for

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_LAUNCH_FAILED ? "launch failed, says the stub"
                                            : "another error of the stub";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute,
                              CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = 227 << 10;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  default:
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute,
                            CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                               CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int i) {
  *device = i;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  return cuCtxGetCurrent(retained);
}
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute,
                            int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) {
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f,
                                      const CUlaunchConfig *config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
