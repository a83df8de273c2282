// Shuffles that any machine can recompute: positions sorted by hashed counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edgelearn {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// Finalizer of splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators",
// OOPSLA 2014).
constexpr uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The seed of one epoch's shuffle.
constexpr uint64_t epoch_seed(uint64_t seed, uint64_t epoch) {
  return mix(seed + (epoch + 1) * kGolden);
}

// Keeps its buffers between calls.
class Permuter {
 public:
  // The first `count` of the positions 0..n-1, ordered by mix(seed + (i + 1) * kGolden), stable.
  const uint32_t* first(uint64_t seed, size_t n, size_t count);
  const uint32_t* all(uint64_t seed, size_t n) { return first(seed, n, n); }

 private:
  struct Entry {
    uint64_t key;
    uint32_t position;
  };
  std::vector<Entry> entries_, sorted_;
  std::vector<uint32_t> ends_, out_;
};

// Integers below 2^62, as torch.randint(0, 2**62, ()) draws them on the CPU: the Mersenne Twister
// MT19937 seeded with 32 bits, two outputs per number. Only what is asked for is generated.
class TorchDraws {
 public:
  explicit TorchDraws(uint64_t seed) { restart(seed); }
  void restart(uint64_t seed);
  uint64_t next();

 private:
  static constexpr int kSize = 624, kShift = 397;
  uint32_t output();
  uint32_t state_[kSize];
  int seeded_ = 0, next_ = 0;
};

}  // namespace edgelearn
