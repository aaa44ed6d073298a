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
  void* at = nullptr;
  if (posix_memalign(&at, size < HUGE_PAGE ? 64 : HUGE_PAGE, size)) throw std::bad_alloc();
#ifdef __linux__
  // A plane's channels lie on many pages; of 4 KiB, more than the processor keeps the addresses of.
  if (size >= HUGE_PAGE) madvise(at, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
  return {at, size, run_};
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
