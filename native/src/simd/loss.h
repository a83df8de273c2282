// Cross-entropy with its gradient, and small passes over activations.
#pragma once

#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

inline double cross_entropy(const CrossEntropy& p) {
  constexpr float kMinusInfinity = -__builtin_inff();
  double total = 0.0;
  for (int b = 0; b < p.batch; b++) {
    float* z = p.z + static_cast<size_t>(b) * p.stride;
    const int64_t label = p.y[b];
    const float weight = p.weight[b];
    const float* stored = p.stored ? p.stored[b] : nullptr;
    float distance = 0.f;
    if (stored) {  // of the logits as they are: masks are for the cross-entropy alone
      for (int c = 0; c < p.classes; c++) {
        p.scratch[c] = z[c] - stored[c];
        distance += p.scratch[c] * p.scratch[c];
      }
    }
    if (p.masks) {
      const uint8_t* allowed = p.masks + label * p.classes;
      for (int c = 0; c < p.classes; c++) z[c] = allowed[c] ? z[c] : kMinusInfinity;
    }
    for (int c = p.classes; c < p.stride; c++) z[c] = kMinusInfinity;

    V top = load(z);
    for (int c = W; c < p.stride; c += W) {
      V v = load(z + c);
      top = v > top ? v : top;
    }
    float most = top[0];
    for (int i = 1; i < W; i++) most = top[i] > most ? top[i] : most;
    const float at_label = z[label];
    V mass = {};
    for (int c = 0; c < p.stride; c += W) {
      V e = exp_nonpositive(load(z + c) - most);
      store(z + c, e);
      mass += e;
    }
    const float whole = sum(mass);
    const float factor = p.scale * weight / whole;
    for (int c = 0; c < p.stride; c += W) store(z + c, load(z + c) * factor);
    z[label] -= p.scale * weight;
    double loss = weight * (static_cast<double>(__builtin_logf(whole)) + (most - at_label));
    if (stored) {
      loss += static_cast<double>(p.distill) * distance;
      for (int c = 0; c < p.classes; c++) z[c] += 2.f * p.scale * p.distill * p.scratch[c];
    }
    total += loss;
  }
  return total;
}

inline void rectify_gradient(float* d, const float* h, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    store(d + i, load(h + i) <= 0.f ? V{} : load(d + i));
  }
}

inline void square(const float* x, float factor, float* out, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    V v = load(x + i);
    store(out + i, v * v * factor);
  }
}

inline void add_square(const float* x, float* sum, size_t size) {
  for (size_t i = 0; i < size; i += W) {
    V v = load(x + i);
    store(sum + i, load(sum + i) + v * v);
  }
}

inline void transpose(const float* in, int rows, int cols, float* out) {
  for (int c = 0; c < cols; c++) {
    for (int r = 0; r < rows; r++) {
      out[static_cast<size_t>(c) * rows + r] = in[static_cast<size_t>(r) * cols + c];
    }
  }
}

// Any size, any alignment: these two work on the caller's arrays.
inline void axpy(const float* x, float factor, float* sum, size_t size) {
  size_t i = 0;
  for (; i + W <= size; i += W) store(sum + i, load(sum + i) + load(x + i) * factor);
  for (; i < size; i++) sum[i] += x[i] * factor;
}

inline double squared_norm(const float* x, size_t size, bool* finite) {
  // Doubles, because squares of floats overflow. A fixed number of partial sums fixes the bits.
  double partial[8] = {};
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int j = 0; j < 8; j++) partial[j] += static_cast<double>(x[i + j]) * x[i + j];
  }
  for (; i < size; i++) partial[0] += static_cast<double>(x[i]) * x[i];
  double total = 0.0;
  for (double p : partial) total += p;
  *finite = total - total == 0.0;  // no sum of finite squares overflows a double
  return total;
}

}  // namespace edgelearn::EDGELEARN_ISA
