// The data set that all devices of a fleet share, by reference.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelearn {

struct Data {
  const void* x = nullptr;  // [size, features]
  bool bytes = false;       // uint8, else float32
  int64_t size = 0;
  size_t features = 0;
  float scale = 1.f, shift = 0.f;
  const int64_t* y = nullptr;  // [size]
  int64_t lowest_label = 0, highest_label = 0;
  const int64_t* domain_index = nullptr;  // [domains, taps, features]
  const float* domain_weight = nullptr;
  int64_t domains = 1, taps = 0;
  const uint8_t* task_masks = nullptr;  // [mask_classes, mask_classes]
  int64_t mask_classes = 0;

  // An id is domain * size + index.
  int64_t num_ids() const { return size * domains; }
  int64_t label(int32_t id) const { return y[id % size]; }

  // Writes a sample's features: stored * scale - shift, in two roundings.
  void load(int32_t id, float* out) const;
};

}  // namespace edgelearn
