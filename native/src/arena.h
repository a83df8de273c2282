// One block of memory, cut into pieces that each begin on a cache line.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace edgelearn {

constexpr size_t kLine = 64;  // bytes

constexpr size_t padded(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Grows, never shrinks; a thread keeps its own between calls, so small rounds allocate nothing.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    reset(0);
    std::free(block_);
  }

  // Ends the life of all pieces and makes room for `bytes`.
  void reset(size_t bytes) {
    if (bytes > capacity_) {
      reset(0);
      std::free(block_);
      block_ = nullptr;
      capacity_ = 0;
      block_ = static_cast<char*>(std::aligned_alloc(kLine, padded(bytes, kLine)));
      if (!block_) throw std::bad_alloc();
      capacity_ = padded(bytes, kLine);
    }
#ifdef __SANITIZE_ADDRESS__
    if (block_) ASAN_UNPOISON_MEMORY_REGION(block_, capacity_);
#endif
  }

  char* data() { return block_; }

 private:
  char* block_ = nullptr;
  size_t capacity_ = 0;
};

// Measures when it has no memory, cuts when it has: run the same cuts twice.
class Cutter {
 public:
  explicit Cutter(char* block) : block_(block) {}

  template <typename T>
  void cut(T*& piece, size_t count) {
    if (block_) piece = reinterpret_cast<T*>(block_ + used_);
    const size_t end = used_ + count * sizeof(T);
    used_ = padded(end, kLine);
#ifdef __SANITIZE_ADDRESS__  // a gap behind each piece, so that running over its end is seen
    used_ += kLine;
    if (block_) ASAN_POISON_MEMORY_REGION(block_ + end, used_ - end);
#endif
  }

  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

}  // namespace edgelearn
