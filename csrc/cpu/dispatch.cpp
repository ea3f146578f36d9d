// Chooses the kernels for this processor.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace densenet_fast {

extern const KernelTable table_default;
#if defined(__x86_64__)
extern const KernelTable table_avx2;
extern const KernelTable table_avx512;
extern const KernelTable table_avx512_bf16;
#endif

namespace {

const KernelTable& best(const char* limit) {
#if defined(__x86_64__)
  const bool any = limit == nullptr;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && (any || !std::strcmp(limit, "avx512_bf16"))) return table_avx512_bf16;
  if (avx512 && (any || !std::strcmp(limit, "avx512"))) return table_avx512;
  if (avx2 && (any || !std::strcmp(limit, "avx2"))) return table_avx2;
#endif
  if (limit == nullptr || !std::strcmp(limit, "default")) return table_default;
  throw std::runtime_error(std::string("DENSENET_FAST_CPU: expected default, avx2, avx512 or avx512_bf16, as far as "
                                       "this processor has them, got ") + limit);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = best(std::getenv("DENSENET_FAST_CPU"));
  return chosen;
}

}  // namespace densenet_fast
