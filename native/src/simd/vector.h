// Vectors of EDGELEARN_WIDTH floats in the compiler's own notation; no intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#define EDGELEARN_INLINE inline __attribute__((always_inline))

namespace edgelearn::EDGELEARN_ISA {

constexpr int W = EDGELEARN_WIDTH;
constexpr bool kManyRegisters = EDGELEARN_REGISTERS >= 32;

typedef float V __attribute__((vector_size(4 * W), may_alias));
typedef float LooseV __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(4 * W), may_alias));
typedef int32_t LooseVI __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float V4 __attribute__((vector_size(16), may_alias));
typedef float LooseV4 __attribute__((vector_size(16), aligned(4), may_alias));

EDGELEARN_INLINE V load(const float* p) { return *reinterpret_cast<const LooseV*>(p); }
EDGELEARN_INLINE void store(float* p, V v) { *reinterpret_cast<LooseV*>(p) = v; }
EDGELEARN_INLINE void store(int32_t* p, VI v) { *reinterpret_cast<LooseVI*>(p) = v; }
EDGELEARN_INLINE V4 load4(const float* p) { return *reinterpret_cast<const LooseV4*>(p); }
EDGELEARN_INLINE void store4(float* p, V4 v) { *reinterpret_cast<LooseV4*>(p) = v; }

// x - 0 and not 0 + x: only the former is the identity for every x, and so costs nothing.
EDGELEARN_INLINE V splat(float x) { return x - V{}; }
EDGELEARN_INLINE VI splat(int32_t x) { return x - VI{}; }

// Keeps a value in a register. Else gcc folds its load into every product that uses it.
EDGELEARN_INLINE void keep(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  (void)v;
#endif
}

template <typename T>
EDGELEARN_INLINE void store_some(T* p, const T* from, int count) {
  for (int i = 0; i < count; i++) p[i] = from[i];
}

// Stores the first `count` elements; all if there are that many.
EDGELEARN_INLINE void store_up_to(float* p, V v, int count) {
  if (count >= W) return store(p, v);
  alignas(64) float lanes[W];
  store(lanes, v);
  store_some(p, lanes, count);
}
EDGELEARN_INLINE void store_up_to(int32_t* p, VI v, int count) {
  if (count >= W) return store(p, v);
  alignas(64) int32_t lanes[W];
  store(lanes, v);
  store_some(p, lanes, count);
}

// NaN stays NaN: a device that diverged must not look healthy.
template <typename T>
EDGELEARN_INLINE T rectify(T v) {
  return v < 0.f ? T{} : v;
}

// Sums of neighbours: per 128 bits a0+a1, a2+a3, b0+b1, b2+b3.
EDGELEARN_INLINE V pair_sums(V a, V b) {
#if EDGELEARN_WIDTH == 16
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif EDGELEARN_WIDTH == 8
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Sum of the 128-bit parts of a vector.
EDGELEARN_INLINE V4 fold(V v) {
#if EDGELEARN_WIDTH == 16
  return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 8, 9, 10, 11)) +
         (__builtin_shufflevector(v, v, 4, 5, 6, 7) +
          __builtin_shufflevector(v, v, 12, 13, 14, 15));
#elif EDGELEARN_WIDTH == 8
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors, as one.
EDGELEARN_INLINE V4 sums(V a, V b, V c, V d) {
  return fold(pair_sums(pair_sums(a, b), pair_sums(c, d)));
}

EDGELEARN_INLINE float sum(V v) {
  V4 s = fold(v);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// e^x for x <= 0 to about two units in the last place; 0 below -60, lest products with
// it become denormal. Cody-Waite, then Cephes' polynomial.
EDGELEARN_INLINE V exp_nonpositive(V x) {
  const V tiny = splat(-60.f);
  V clamped = x < tiny ? tiny : x;
  V n = clamped * 1.44269504088896341f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  keep(n);
  n -= 12582912.f;
  V r = clamped - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  VI exponent = (__builtin_convertvector(n, VI) + 127) << 23;
  V result = p * reinterpret_cast<V&>(exponent);
  return x < tiny ? V{} : result;
}

// Splits n into the fewest parts of at most `most`, as equal as can be: 10 by 6 is 5 + 5.
template <typename F>
EDGELEARN_INLINE void split_evenly(int n, int most, F&& part) {
  int parts = (n + most - 1) / most;
  if (parts == 0) return;
  int size = n / parts, longer = n % parts;
  for (int i = 0, begin = 0; i < parts; i++) {
    int length = size + (i < longer ? 1 : 0);
    part(begin, length);
    begin += length;
  }
}

EDGELEARN_INLINE int smaller(int a, int b) { return a < b ? a : b; }
EDGELEARN_INLINE int larger(int a, int b) { return a > b ? a : b; }

}  // namespace edgelearn::EDGELEARN_ISA
