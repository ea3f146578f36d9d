// The kernels of the stem and the head, compiled once for each instruction set with TABLE set to its name (see
// vectors.h).
//
//   y = (x - mean) * scale + shift;   A = relu(y);   D = grad * (y > 0), and grad where y is NaN, as in stock's ReLU
#include "pool_kernels.h"

#include "vectors.h"

namespace densenet_fast {
namespace {

template <typename T>
void bn_relu_max(const Lines<T>& lines, int64_t ld, int64_t width, int64_t cols, Affine affine, T* out,
                 uint8_t* argmax) {
  for (int64_t o = 0; 2 * o < width; ++o, out += cols, argmax += cols) {
    const int first = o > 0 ? 0 : 1, last = 2 * o + 1 < width ? 2 : 1;
    columns(cols, [&]<int N>(int64_t c) {
      const AffineLanes<N> bn(affine, c);
      floats<N> best = floats<N>{} - 1;
      ints<N> position = {};
      for (int64_t line = 0; line < lines.count; ++line) {
        const T* x = lines.data[line] + (2 * o - 1) * ld + c;
        for (int i = first; i <= last; ++i) {
          const floats<N> a = relu(bn(load<N>(x + i * ld)));
          const ints<N> better = (a > best) | (a != a);
          best = better ? a : best;
          position = better ? ints<N>{} + (lines.places[line] + i) : position;
        }
      }
      store<N>(out + c, best);
      store<N>(argmax + c, position);
    });
  }
}

template <typename T>
void max(const Lines<T>& lines, int64_t ld, int64_t width, int64_t cols, Rows<T> out) {
  for (int64_t o = 0; 2 * o < width; ++o, out.data += out.ld) {
    const int first = o > 0 ? 0 : 1, last = 2 * o + 1 < width ? 2 : 1;
    columns(cols, [&]<int N>(int64_t c) {
      floats<N> best = {};
      for (int64_t line = 0; line < lines.count; ++line) {
        const T* x = lines.data[line] + (2 * o - 1) * ld + c;
        for (int i = first; i <= last; ++i) {
          const floats<N> a = load<N>(x + i * ld);
          best = (a > best) | (a != a) ? a : best;
        }
      }
      store<N>(out.data + c, best);
    });
  }
}

template <typename T>
void mask_max(const Readers<T>& readers, int64_t grad_ld, Rows<const T> x, int64_t width, int64_t cols, Affine affine,
              T* out, GradientSums sums) {
  for (int64_t o = 0; 2 * o < width; ++o) {
    const bool pair = 2 * o + 1 < width, next = 2 * o + 2 < width;
    columns(cols, [&]<int N>(int64_t c) {
      // the gradient of output p for its pixel i
      auto share = [&](int64_t line, int64_t p, int i) {
        const ints<N> mine = load<N>(readers.argmaxes[line] + p * cols + c) == readers.places[line] + i;
        return mine ? load<N>(readers.data[line] + p * grad_ld + c) : floats<N>{};
      };
      floats<N> even = {}, odd = {};
      for (int64_t line = 0; line < readers.count; ++line) {
        even += share(line, o, 1);
        odd += share(line, o, 2);
        if (next) odd += share(line, o + 1, 0);
      }
      const AffineLanes<N> bn(affine, c);
      floats<N> total_d = load<N>(sums.d + c), total_dx = load<N>(sums.dx + c);
      auto pixel = [&](int64_t u, floats<N> grad) {
        const floats<N> centred = load<N>(x.data + u * x.ld + c) - bn.mean;
        const floats<N> d = centred * bn.scale + bn.shift <= 0 ? floats<N>{} : grad;
        total_d += d;
        total_dx += d * centred;
        store<N>(out + u * cols + c, bn.scale * d);
      };
      pixel(2 * o, even);
      if (pair) pixel(2 * o + 1, odd);
      store<N>(sums.d + c, total_d);
      store<N>(sums.dx + c, total_dx);
    });
  }
}

template <typename T>
void bn_relu_total(Rows<const T> x, int64_t rows, int64_t cols, Affine affine, float* total) {
  columns(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    floats<N> sum = load<N>(total + c);
    parts(rows, [&](int64_t first, int64_t count) {
      floats<N> part = {};
      for (int64_t r = first; r < first + count; ++r) part += relu(bn(load<N>(x.data + r * x.ld + c)));
      sum += part;
    });
    store<N>(total + c, sum);
  });
}

template <typename T>
void mask_average(const T* grad, float factor, Rows<const T> x, int64_t rows, int64_t cols, Affine affine, T* out,
                  GradientSums sums) {
  columns(cols, [&]<int N>(int64_t c) {
    const AffineLanes<N> bn(affine, c);
    const floats<N> share = factor * load<N>(grad + c);
    MaskSums<N> own;
    parts(rows, [&](int64_t first, int64_t count) {
      MaskSums<N> part;
      for (int64_t r = first; r < first + count; ++r) {
        const floats<N> centred = load<N>(x.data + r * x.ld + c) - bn.mean;
        const ints<N> masked = centred * bn.scale + bn.shift <= 0;
        part.d += masked ? floats<N>{} : floats<N>{} + 1;
        part.dx += masked ? floats<N>{} : centred;
        store<N>(out + r * cols + c, masked ? floats<N>{} : bn.scale * share);
      }
      own.add({share * part.d, share * part.dx});
    });
    own.add_to(sums, c);
  });
}

template <typename T>
void scaled(const float* values, int64_t count, float factor, T* out) {
  columns(count, [&]<int N>(int64_t c) { store<N>(out + c, factor * load<N>(values + c)); });
}

template <typename T>
constexpr PoolKernels<T> table() {
  return {bn_relu_max<T>, max<T>, mask_max<T>, bn_relu_total<T>, mask_average<T>, scaled<T>};
}

}  // namespace

extern const PoolKernelTable JOIN(pool_table_, TABLE);
const PoolKernelTable JOIN(pool_table_, TABLE) = {table<float>(), table<bf16>()};

}  // namespace densenet_fast
