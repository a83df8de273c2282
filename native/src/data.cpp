#include "data.h"

namespace edgelearn {

namespace {

// Half to even, as torch rounds: adding 1.5 * 2^23 leaves no bits behind the point.
float rounded(float v) {
  constexpr float kMagic = 12582912.f;
  return (v + kMagic) - kMagic;
}

template <typename T>
void load_as(const Data& data, int32_t id, float* out) {
  const T* x = static_cast<const T*>(data.x) + static_cast<size_t>(id % data.size) * data.features;
  const float scale = data.scale, shift = data.shift;
  const size_t features = data.features;
  if (!data.domain_index) {
    for (size_t f = 0; f < features; f++) out[f] = static_cast<float>(x[f]) * scale - shift;
    return;
  }
  const size_t at = static_cast<size_t>(id / data.size) * data.taps * features;
  const int64_t* index = data.domain_index + at;
  if (data.taps == 1) {
    for (size_t f = 0; f < features; f++) out[f] = static_cast<float>(x[index[f]]) * scale - shift;
    return;
  }
  const float* weight = data.domain_weight + at;
  for (size_t f = 0; f < features; f++) out[f] = 0.f;
  for (int64_t tap = 0; tap < data.taps; tap++, index += features, weight += features) {
    for (size_t f = 0; f < features; f++) out[f] += weight[f] * static_cast<float>(x[index[f]]);
  }
  for (size_t f = 0; f < features; f++) {
    float v = out[f];
    if constexpr (sizeof(T) == 1) v = static_cast<uint8_t>(static_cast<int32_t>(rounded(v)));
    out[f] = v * scale - shift;
  }
}

}  // namespace

void Data::load(int32_t id, float* out) const {
  bytes ? load_as<uint8_t>(*this, id, out) : load_as<float>(*this, id, out);
}

}  // namespace edgelearn
