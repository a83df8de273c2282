// The optimizer's step on a vector of weights.
#pragma once

#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

// What a step has beside the gradient decides what its tiles read, so each case has its kernel.
enum class Terms {
  kNone,      // theta - gradient
  kNoBuffer,  // weight decay, proximal term or pull
  kMomentum,  // and a buffer
  kCharge,    // and a path integral, with a buffer or without
};

EDGELEARN_INLINE Terms terms_of(const Step& s) {
  if (s.charge) return Terms::kCharge;
  if (s.momentum) return Terms::kMomentum;
  return s.plain ? Terms::kNone : Terms::kNoBuffer;
}

// A tile adds the loss's gradient to what `begin_step` gives and hands the sum to `end_step`.
// Gradients are added with a sign: down to the weights themselves, or up to the buffer or charge.
template <Terms kTerms>
constexpr float kSign = kTerms == Terms::kMomentum || kTerms == Terms::kCharge ? 1.f : -1.f;

// Elements of `s` at `at`, the place of a vector of weights in the packed vectors.
template <Terms kTerms>
EDGELEARN_INLINE V begin_step(const Step& s, size_t at) {
  if constexpr (kTerms == Terms::kCharge) {  // weight decay and momentum are not charged
    return s.proximal == 0.f ? V{} : (load(s.theta + at) - load(s.initial + at)) * s.proximal;
  }
  V theta = load(s.theta + at);
  if constexpr (kTerms == Terms::kNone) return theta;
  V sum = kTerms == Terms::kMomentum ? V{} : theta;
  if (s.decay != 0.f) sum += theta * (kSign<kTerms> * s.decay);
  if (s.proximal != 0.f) sum += (theta - load(s.initial + at)) * (kSign<kTerms> * s.proximal);
  if constexpr (kTerms == Terms::kMomentum) {
    if (s.momentum_factor != 0.f) sum += load(s.momentum + at) * s.momentum_factor;
  }
  return sum;
}

// The step itself and not the difference that it makes is charged, lest small ones be rounded away.
EDGELEARN_INLINE V end_charged_step(const Step& s, size_t at, V charged) {
  const V theta = load(s.theta + at);
  V down = charged;
  if (s.decay != 0.f) down += theta * s.decay;
  if (s.momentum) {
    if (s.momentum_factor != 0.f) down += load(s.momentum + at) * s.momentum_factor;
    store(s.momentum + at, down);
  }
  if (s.pull) down -= load(s.pull + at) * (load(s.anchor + at) - (theta - down));
  store(s.charge + at, load(s.charge + at) + charged * s.inverse_lr * down);
  return theta - down;
}

// The weights after the step.
template <Terms kTerms>
EDGELEARN_INLINE V end_step(const Step& s, size_t at, V sum) {
  if constexpr (kTerms == Terms::kNone) return sum;
  if constexpr (kTerms == Terms::kCharge) return end_charged_step(s, at, sum);
  V theta = sum;
  if constexpr (kTerms == Terms::kMomentum) {
    store(s.momentum + at, sum);
    theta = load(s.theta + at) - sum;
  }
  if (s.pull) theta += load(s.pull + at) * (load(s.anchor + at) - theta);
  return theta;
}

template <Terms kTerms>
void step_range_as(const Step& s, const float* gradient, size_t begin, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    V sum = begin_step<kTerms>(s, begin + i) + kSign<kTerms> * load(gradient + i);
    store(s.result + begin + i, end_step<kTerms>(s, begin + i, sum));
  }
}

inline void step_range(const Step& s, const float* gradient, size_t begin, size_t size) {
  switch (terms_of(s)) {
    case Terms::kNone:
      return step_range_as<Terms::kNone>(s, gradient, begin, size);
    case Terms::kNoBuffer:
      return step_range_as<Terms::kNoBuffer>(s, gradient, begin, size);
    case Terms::kMomentum:
      return step_range_as<Terms::kMomentum>(s, gradient, begin, size);
    case Terms::kCharge:
      return step_range_as<Terms::kCharge>(s, gradient, begin, size);
  }
}

// Curvature to the weight of the pull's anchor: c s / (1 + c s).
inline void pull_weights(float* curvature, float strength, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    V stiffness = load(curvature + i) * strength;
    store(curvature + i, stiffness / (stiffness + 1.f));
  }
}

}  // namespace edgelearn::EDGELEARN_ISA
