#include "memory.h"

#include <c10/core/Allocator.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gatedprune {
namespace {

constexpr size_t SMALL = 64 << 10;  // the system's own allocator keeps such pieces anyway
constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int64_t FORGET = 8;  // runs

thread_local std::shared_ptr<Arena> current;

void report(void* at, int64_t bytes) {
  c10::reportMemoryUsageToProfiler(at, bytes, 0, 0, c10::Device(c10::DeviceType::CPU));
}

}  // namespace

void* allocate(size_t bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, bytes < HUGE_PAGE ? 64 : HUGE_PAGE, bytes)) throw std::bad_alloc();
#ifdef __linux__
  if (bytes >= HUGE_PAGE) madvise(at, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
  return at;
}

Scratch::~Scratch() { std::free(at_); }

float* Scratch::floats(int64_t n) {
  if (n > size_) {
    size_t bytes = size_t(n) * sizeof(float);
    if (bytes > HUGE_PAGE / 4) bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    std::free(std::exchange(at_, nullptr));
    size_ = 0;
    at_ = static_cast<float*>(allocate(bytes));
    size_ = int64_t(bytes / sizeof(float));
  }
  return at_;
}

Arena::~Arena() {
  for (const Block& b : free_) std::free(b.at);
}

Arena::Block Arena::take(size_t size) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto b = free_.begin(); b != free_.end(); b++)
      if (b->size >= size && (best == free_.end() || b->size < best->size)) best = b;
    if (best != free_.end()) {
      const Block found{best->at, best->size, run_};
      free_.erase(best);
      return found;
    }
  }
  return {allocate(size), size, run_};
}

void Arena::give_back(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  block.used = run_;
  free_.push_back(block);
}

at::Tensor Arena::empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < SMALL) return at::empty(sizes, options);
  const Block block = take(bytes);
  report(block.at, int64_t(bytes));
  // The tensor may outlive the program.
  auto free = [self = shared_from_this(), block, bytes](void*) {
    report(block.at, -int64_t(bytes));
    self->give_back(block);
  };
  return at::from_blob(block.at, sizes, std::move(free), options);
}

void Arena::settle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_++;
  auto old = [this](const Block& b) { return b.used + FORGET < run_; };
  for (const Block& b : free_)
    if (old(b)) std::free(b.at);
  free_.erase(std::remove_if(free_.begin(), free_.end(), old), free_.end());
}

Within::Within(std::shared_ptr<Arena> arena) : before_(std::exchange(current, std::move(arena))) {}
Within::~Within() {
  if (current) current->settle();
  current = std::move(before_);
}

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return current ? current->empty(sizes, options) : at::empty(sizes, options);
}

Range& ahead() {
  thread_local Range range;
  return range;
}

}  // namespace gatedprune
