// Chooses the kernels for this processor.
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

namespace {

struct InstructionSet {
  const KernelTable& kernels;
  const PoolKernelTable& pool_kernels;
};

InstructionSet best(const char* limit) {
#if defined(__x86_64__)
  const bool any = limit == nullptr;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && (any || !std::strcmp(limit, "avx512_bf16"))) return {table_avx512_bf16, pool_table_avx512_bf16};
  if (avx512 && (any || !std::strcmp(limit, "avx512"))) return {table_avx512, pool_table_avx512};
  if (avx2 && (any || !std::strcmp(limit, "avx2"))) return {table_avx2, pool_table_avx2};
#endif
  if (limit == nullptr || !std::strcmp(limit, "default")) return {table_default, pool_table_default};
  throw std::runtime_error(std::string("DENSENET_FAST_CPU: expected default, avx2, avx512 or avx512_bf16, as far as "
                                       "this processor has them, got ") +
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
