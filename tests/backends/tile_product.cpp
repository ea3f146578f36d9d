// Checks the product in tile registers and its transposition, alone: every size
// of the last tiles, results to the bit, and no access outside the operands.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace densenet_fast {
KernelTable with_tile_registers(KernelTable table);
}
using namespace densenet_fast;

// `count` values right before memory that must not be touched
template <typename T>
struct Guarded {
  size_t page = sysconf(_SC_PAGESIZE), bytes;
  char* memory;
  T* data;

  explicit Guarded(size_t count) : bytes((count * sizeof(T) + page - 1) / page * page + page) {
    memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + bytes - page, page, PROT_NONE)) std::exit(2);
    data = reinterpret_cast<T*>(memory + bytes - page) - count;
  }
  ~Guarded() { munmap(memory, bytes); }
};

const uint16_t kIntegers[] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0xbf80, 0xc000, 0xc040};  // 0 1 2 3 4 -1 -2 -3

int value(uint16_t bits) {
  for (int i = 0; i < 8; ++i) {
    if (kIntegers[i] == bits) return i < 5 ? i : 4 - i;
  }
  std::exit(3);
}

uint32_t any_word() { return kIntegers[std::rand() % 8] | static_cast<uint32_t>(kIntegers[std::rand() % 8]) << 16; }

float word_product(uint32_t a, uint32_t b) {
  return value(a & 0xffff) * value(b & 0xffff) + value(a >> 16) * value(b >> 16);
}

// Between the rows of an operand lie `gap` words of NaN
void check(const KernelTable& table, int rows, int cols, int steps, int gap, bool transposed, bool accumulate) {
  const int a_lines = transposed ? steps : rows, a_length = transposed ? rows : steps, a_ld = a_length + gap;
  const int b_ld = cols + gap, ld = cols + gap;
  Guarded<uint32_t> a(a_lines * a_ld - gap), b(steps * b_ld - gap);
  Guarded<float> out(rows * ld - gap);
  for (int i = 0; i < a_lines * a_ld - gap; ++i) a.data[i] = i % a_ld < a_length ? any_word() : ~0u;
  for (int i = 0; i < steps * b_ld - gap; ++i) b.data[i] = i % b_ld < cols ? any_word() : ~0u;
  for (int i = 0; i < rows * ld - gap; ++i) out.data[i] = i;
  Operand left = {a.data, transposed ? 1 : a_ld, transposed ? a_ld : 1};
  Guarded<uint32_t> copy(rows * steps);
  if (transposed) {
    table.b16.transpose(left, rows, steps, copy.data);
    left = {copy.data, steps, 1};
  }
  table.b16.product(left, {b.data, 0, b_ld}, rows, cols, steps, out.data, ld, accumulate);
  for (int i = 0; i < rows * ld - gap; ++i) {
    const int r = i / ld, c = i % ld;
    float expected = c < cols && !accumulate ? 0 : i;
    for (int k = 0; c < cols && k < steps; ++k) {
      expected += word_product(a.data[transposed ? k * a_ld + r : r * a_ld + k], b.data[k * b_ld + c]);
    }
    if (out.data[i] != expected) {
      std::printf(
          "%d x %d x %d, gap %d, transposed %d, accumulate %d: [%d, "
          "%d] is %g instead of %g\n",
          rows, cols, steps, gap, transposed, accumulate, r, c, out.data[i], expected);
      std::exit(1);
    }
  }
}

int main() {
  const KernelTable table = with_tile_registers({});
  int count = 0;
  for (int rows : {1, 2, 15, 16, 17, 28, 31, 32, 33, 47, 49, 100, 113}) {
    for (int steps : {1, 2, 7, 15, 16, 17, 23, 31, 32, 33, 50, 56, 129}) {
      for (int variant = 0; variant < 16; ++variant, ++count) {
        check(table, rows, variant & 1 ? 32 : 16, steps, variant & 2 ? 16 : 0, variant & 4, variant & 8);
        if (count % 3 == 0) table.release();
      }
    }
  }
  std::printf("%d products\n", count);
}
