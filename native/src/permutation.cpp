#include "permutation.h"

#include <algorithm>
#include <bit>

namespace edgelearn {

namespace {

// Sorted by key; equal keys keep their order.
template <typename Entry>
void insertion_sort(Entry* begin, Entry* end) {
  for (Entry* i = begin + 1; i < end; i++) {
    Entry entry = *i;
    Entry* j = i;
    for (; j > begin && entry.key < j[-1].key; j--) *j = j[-1];
    *j = entry;
  }
}

}  // namespace

const uint32_t* Permuter::first(uint64_t seed, size_t n, size_t count) {
  count = std::min(count, n);
  entries_.resize(n);
  out_.resize(count);
  if (count == 0) return out_.data();

  // Keys are uniform, so those below a threshold are about as many as wanted and a few more.
  uint64_t threshold = ~uint64_t{0};
  if (count * 2 < n) {
    const double share =
        (static_cast<double>(count) + 4.0 * std::bit_width(count) + 8.0) / static_cast<double>(n);
    if (share < 0.9) threshold = static_cast<uint64_t>(share * 18446744073709551615.0);
  }
  size_t kept = 0;
  for (size_t i = 0; i < n; i++) {
    const uint64_t key = mix(seed + (i + 1) * kGolden);
    entries_[kept] = {key, static_cast<uint32_t>(i)};
    kept += key <= threshold;
  }
  if (kept < count) {  // bad luck: take all
    for (kept = 0; kept < n; kept++) {
      entries_[kept] = {mix(seed + (kept + 1) * kGolden), static_cast<uint32_t>(kept)};
    }
    threshold = ~uint64_t{0};
  }

  Entry* sorted = entries_.data();
  if (kept > 16) {
    // One bucket per key or two, then the few that are still out of order.
    const int bits = std::bit_width(kept) - 1;
    const int shift = std::bit_width(threshold) - bits;
    ends_.assign((size_t{1} << bits) + 1, 0);
    sorted_.resize(kept);
    for (size_t i = 0; i < kept; i++) ends_[(entries_[i].key >> shift) + 1]++;
    for (size_t b = 1; b < ends_.size(); b++) ends_[b] += ends_[b - 1];
    for (size_t i = 0; i < kept; i++) sorted_[ends_[entries_[i].key >> shift]++] = entries_[i];
    sorted = sorted_.data();
  }
  insertion_sort(sorted, sorted + kept);
  for (size_t i = 0; i < count; i++) out_[i] = sorted[i].position;
  return out_.data();
}

void TorchDraws::restart(uint64_t seed) {
  state_[0] = static_cast<uint32_t>(seed);
  seeded_ = 1;
  next_ = 0;
}

uint32_t TorchDraws::output() {
  // In place: element i is replaced when it is read, and by then those it needs are seeded.
  const int i = next_ % kSize;
  const int needed = std::min(kSize, i + kShift + 1);
  for (; seeded_ < needed; seeded_++) {
    const uint32_t before = state_[seeded_ - 1];
    state_[seeded_] = 1812433253u * (before ^ (before >> 30)) + static_cast<uint32_t>(seeded_);
  }
  const uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % kSize] & 0x7fffffffu);
  state_[i] = state_[(i + kShift) % kSize] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
  next_ = i + 1;
  uint32_t z = state_[i];
  z ^= z >> 11;
  z ^= (z << 7) & 0x9d2c5680u;
  z ^= (z << 15) & 0xefc60000u;
  return z ^ (z >> 18);
}

uint64_t TorchDraws::next() {
  const uint64_t high = output();
  return ((high << 32) | output()) & ((uint64_t{1} << 62) - 1);
}

}  // namespace edgelearn
