// The optimizer's step on a vector of weights.
#pragma once

#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

// Fetches what `stepped` will read of C vectors: these streams don't fit the second-level cache,
// and the products of a tile are time enough to wait for them.
template <int C>
EDGELEARN_INLINE void prefetch_step(const Step& s, size_t at) {
#pragma GCC unroll 4
  for (int c = 0; c < C; c++) {
    const size_t here = at + c * W;
    if (s.pull) {
      __builtin_prefetch(s.pull + here, 0, 0);
      __builtin_prefetch(s.anchor + here, 0, 0);
    }
    if (s.momentum) __builtin_prefetch(s.momentum + here, 1);
  }
}

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
