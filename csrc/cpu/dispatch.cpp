// Chooses the kernels for this processor.
#if defined(AMX_BF16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pool_kernels.h"

namespace densenet_fast {

#define DECLARE(name)                    \
  extern const KernelTable table_##name; \
  extern const PoolKernelTable pool_table_##name;

DECLARE(default)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif
#if defined(AMX_BF16)
KernelTable with_tile_registers(KernelTable table);  // amx_bf16.cpp
#endif

namespace {

struct InstructionSet {
  const KernelTable& kernels;
  const PoolKernelTable& pool_kernels;
};

#if defined(AMX_BF16)
// Whether the processor has AMX for bf16 and the operating system saves its registers and lets this process use them;
// emulated ones, whether they are asked for
bool tile_registers([[maybe_unused]] const char* limit) {
#if defined(DENSENET_FAST_EMULATED_TILES)
  return limit != nullptr;
#else
  constexpr unsigned kProcessor = 1 << 24 | 1 << 22, kSaved = 1 << 18 | 1 << 17;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kProcessor) != kProcessor) return false;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

InstructionSet best(const char* limit) {
#if defined(__x86_64__)
  const bool any = limit == nullptr;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(AMX_BF16)
  if (avx512_bf16 && (any || !std::strcmp(limit, "amx_bf16")) && tile_registers(limit)) {
    static const KernelTable table_amx_bf16 = with_tile_registers(table_avx512_bf16);
    return {table_amx_bf16, pool_table_avx512_bf16};
  }
#endif
  if (avx512_bf16 && (any || !std::strcmp(limit, "avx512_bf16"))) return {table_avx512_bf16, pool_table_avx512_bf16};
  if (avx512 && (any || !std::strcmp(limit, "avx512"))) return {table_avx512, pool_table_avx512};
  if (avx2 && (any || !std::strcmp(limit, "avx2"))) return {table_avx2, pool_table_avx2};
#endif
  if (limit == nullptr || !std::strcmp(limit, "default")) return {table_default, pool_table_default};
  throw std::runtime_error(std::string("DENSENET_FAST_CPU: expected default, avx2, avx512, avx512_bf16 or amx_bf16, "
                                       "as far as this processor has them, got ") +
                           limit);
}

const InstructionSet& chosen() {
  static const InstructionSet set = best(std::getenv("DENSENET_FAST_CPU"));
  return set;
}

}  // namespace

const KernelTable& kernels() { return chosen().kernels; }
const PoolKernelTable& pool_kernels() { return chosen().pool_kernels; }

}  // namespace densenet_fast
