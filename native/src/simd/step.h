// The optimizer's step on a vector of weights.
#pragma once

#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

// Weights after a step that is not plain; `at` is their place in the packed vectors.
EDGELEARN_INLINE V stepped(const Step& s, size_t at, V theta, V gradient) {
  V g = gradient + theta * s.decay;
  if (s.proximal != 0.f) g += (theta - load(s.initial + at)) * s.proximal;
  if (s.momentum) {
    if (s.momentum_factor != 0.f) g += load(s.momentum + at) * s.momentum_factor;
    store(s.momentum + at, g);
  }
  theta -= g;
  if (s.pull) theta += load(s.pull + at) * (load(s.anchor + at) - theta);
  return theta;
}

inline void step_range(const Step& s, const float* gradient, size_t begin, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    V theta = load(s.theta + begin + i), g = load(gradient + i);
    store(s.result + begin + i, s.plain ? theta - g : stepped(s, begin + i, theta, g));
  }
}

}  // namespace edgelearn::EDGELEARN_ISA
