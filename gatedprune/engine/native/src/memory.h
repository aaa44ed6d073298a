// Memory of results, and what is fetched ahead.
#pragma once
#include "layer.h"
#include <ATen/ATen.h>

#include <memory>
#include <mutex>
#include <vector>

namespace gatedprune {

// Memory for `std::free`, aligned to cache lines, on large pages where it fills some: a layer reads from more pages of 4 KiB
// than the processor keeps the addresses of.
void* allocate(size_t bytes);

// Memory that a thread keeps for what its next layers put together. It grows, and is never given back.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch();
  // At least so many, aligned as above; what was there before may be lost.
  float* floats(int64_t n);

 private:
  float* at_ = nullptr;
  int64_t size_ = 0;
};

// Blocks that a recorded program keeps from run to run, since each needs the same ones again: memory that goes back to
// the system after each run is handed out anew page by page and zeroed, which takes longer than many a layer.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  ~Arena();
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
  // After a run: blocks that have not been needed for a while are freed.
  void settle();

 private:
  struct Block {
    void* at;
    size_t size;
    int64_t used;  // in which run last
  };
  Block take(size_t size);
  void give_back(Block block);

  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t run_ = 0;
};

// While there is one, `fresh` in this thread takes memory from the arena.
class Within {
 public:
  explicit Within(std::shared_ptr<Arena> arena);
  ~Within();
  Within(const Within&) = delete;

 private:
  std::shared_ptr<Arena> before_;
};

// Like `at::empty`.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

// What a program that runs in this thread will read after the operator that is running.
Range& ahead();

}  // namespace gatedprune
