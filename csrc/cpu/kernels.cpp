// The kernels of the block, compiled once for each instruction set with TABLE set to its name (see vectors.h).
#include "kernels.h"

#include "line.h"
#include "product.h"
#include "rows.h"
#include "winograd.h"

namespace densenet_fast {
namespace {

template <typename T>
constexpr Kernels<T> table() {
  return {.bn_relu = bn_relu<T>,
          .statistics = statistics<T>,
          .mask = mask<T>,
          .mask_accumulate = mask_accumulate<T>,
          .finalise = finalise<T>,
          .dropout = dropout<T>,
          .bn_relu_mean = bn_relu_mean<T>,
          .mask_windows = mask_windows<T>,
          .fold = fold,
          .add = add<T>,
          .store_rows = store_rows<T>,
          .pack = pack<T>,
          .product = product<T>,
          .transpose = nullptr,
          .square = winograd_kernels<2, T>(),
          .wide = winograd_kernels<4, T>(),
          .line = line_kernels<T>()};
}

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

}  // namespace

extern const KernelTable JOIN(table_, TABLE);
const KernelTable JOIN(table_, TABLE) = {STRING(TABLE), table<float>(), table<bf16>(), kMultipliesBf16, nullptr};

}  // namespace densenet_fast
