// Memory of large tensors.
//
// A training step allocates in its forward pass and frees, in reverse order, in its backward pass. All large tensors
// stand in one range of addresses, and each takes the smallest gap that it fits into. So the backward pass of a block
// works where the later blocks' tensors were, and a step within the pages of the step before, which the system need not
// clear again. When no tensor is left, the system is told that it may take the pages.
//
// Other allocators know nothing of these pages. Where torch's own layers stand between two dense blocks, the backward
// pass of the later block ends with its features freed, and theirs is next. So the system gets what is free at once.
#include "memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>
#include <set>

namespace densenet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kLarge = 1 << 18;  // bytes; other allocators serve what is smaller

enum class Purpose {
  kTensor,
  kKeptBehindOthers,  // for the backward pass; when it is freed what is free goes back, unless it is the last such
  kScratch,           // only memory that was used before
};

#if defined(__linux__)

constexpr size_t kPage = 4096, kHugePage = 2 << 20;
// Between tensors, so that they begin at different places of a page: a load waits for a store to the same place of
// another
constexpr size_t kSkew = 1088;

class Range {
 public:
  // The only one. It is never destroyed: tensors may outlive all else.
  static Range& the() {
    static Range& range = *new Range;
    return range;
  }

  // Null if no gap is large enough
  char* allocate(size_t bytes, Purpose purpose) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage + kSkew;
    const std::lock_guard lock(mutex_);
    const char* end = purpose == Purpose::kScratch ? first_ + above(end_) : first_ + size_;
    auto gap = gaps_.end();
    for (auto g = gaps_.begin(); g != gaps_.end(); ++g) {
      if (g->second < size || g->first + size > end) continue;
      if (gap == gaps_.end() || g->second < gap->second) gap = g;
    }
    if (gap == gaps_.end()) return nullptr;
    const auto [start, room] = *gap;
    gaps_.erase(gap);
    if (room > size) gaps_.emplace(start + size, room - size);
    used_.emplace(start, size);
    if (purpose == Purpose::kKeptBehindOthers) behind_others_.insert(start);
    end_ = std::max(end_, start + size);
    return start;
  }

  bool contains(const void* start) const { return first_ <= start && start < first_ + size_; }

  void free(char* start) {
    const std::lock_guard lock(mutex_);
    const auto tensor = used_.find(start);
    auto gap = gaps_.emplace(*tensor).first;
    used_.erase(tensor);
    if (const auto next = std::next(gap); next != gaps_.end() && gap->first + gap->second == next->first) {
      gap->second += next->second;
      gaps_.erase(next);
    }
    if (gap != gaps_.begin()) {
      const auto before = std::prev(gap);
      if (before->first + before->second == gap->first) {
        before->second += gap->second;
        gaps_.erase(gap);
      }
    }
    if (used_.empty()) {
      madvise(first_, below(end_), MADV_FREE);
      end_ = first_;
    }
    if (behind_others_.erase(start) > 0 && !behind_others_.empty()) {
      for (const auto& [start, room] : gaps_) {
        const size_t from = above(start), to = below(std::min(start + room, end_));
        if (from < to) madvise(first_ + from, to - from, MADV_DONTNEED);
      }
    }
  }

 private:
  // Bytes from the first on, in whole pages, as a part of one would split it
  size_t below(const char* end) const { return (end - first_) / kHugePage * kHugePage; }
  size_t above(const char* end) const { return below(end + kHugePage - 1); }

  // As many addresses as the machine has memory; none where addresses are limited
  Range() {
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return;
    const size_t size = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / kHugePage * kHugePage;
    void* start =
        mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return;
    first_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + kHugePage - 1) / kHugePage * kHugePage);
    end_ = first_;
    size_ = size;
    madvise(first_, size, MADV_HUGEPAGE);
    gaps_.emplace(first_, size);
    pthread_atfork([] { the().mutex_.lock(); }, [] { the().mutex_.unlock(); }, [] { the().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::map<char*, size_t> gaps_, used_;  // their sizes by their first bytes
  std::set<char*> behind_others_;
  char *first_ = nullptr, *end_ = nullptr;  // no page behind the end was used since there were no tensors
  size_t size_ = 0;
};

#endif

// None where torch's allocator has to serve
std::optional<Tensor> kept_memory(const std::vector<int64_t>& size, const std::vector<int64_t>& strides, size_t bytes,
                                  ScalarType dtype, Purpose purpose) {
#if defined(__linux__)
  char* start = bytes < kLarge ? nullptr : Range::the().allocate(bytes, purpose);
  if (start == nullptr) return std::nullopt;
  const auto free = [](void* data) { Range::the().free(static_cast<char*>(data)); };
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(start, size, strides, cpu, dtype, free);
#else
  return std::nullopt;
#endif
}

// Strides of adjacent elements, in any order of the dimensions
Tensor empty_strided(const std::vector<int64_t>& size, const std::vector<int64_t>& strides, ScalarType dtype,
                     Purpose purpose) {
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int64_t count = std::accumulate(size.begin(), size.end(), int64_t{1}, std::multiplies<>());
  const size_t bytes = count * aoti_torch_dtype_element_size(number);
  if (const auto made = kept_memory(size, strides, bytes, dtype, purpose)) return *made;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), strides.data(), number,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

bool is_ours(const Tensor& tensor) {
#if defined(__linux__)
  return Range::the().contains(tensor.data_ptr());
#else
  return false;
#endif
}

Tensor empty_like(Tensor like, std::vector<int64_t> size, std::vector<int64_t> strides, bool kept) {
  STD_TORCH_CHECK(size.size() == strides.size(), "strides: expected ", size.size(), ", got ", strides.size());
  const bool made_by_others = like.numel() * like.element_size() >= kLarge && !is_ours(like);
  return empty_strided(size, strides, like.scalar_type(),
                       kept && made_by_others ? Purpose::kKeptBehindOthers : Purpose::kTensor);
}

}  // namespace

Tensor empty(const Tensor& like, const std::vector<int64_t>& size, std::optional<ScalarType> dtype) {
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * size[i];
  return empty_strided(size, strides, dtype.value_or(like.scalar_type()), Purpose::kTensor);
}

#if defined(__linux__)

void* kept_scratch(size_t bytes) { return bytes < kLarge ? nullptr : Range::the().allocate(bytes, Purpose::kScratch); }

void free_scratch(void* memory) noexcept {
  if (Range::the().contains(memory)) {
    Range::the().free(static_cast<char*>(memory));
  } else {
    std::free(memory);
  }
}

#else

void* kept_scratch(size_t) { return nullptr; }

void free_scratch(void* memory) noexcept { std::free(memory); }

#endif

}  // namespace densenet_fast

STABLE_TORCH_LIBRARY_IMPL(densenet_fast, CPU, m) { m.impl("cpu_empty", TORCH_BOX(&densenet_fast::empty_like)); }
