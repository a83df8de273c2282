// Fully connected layers. Weights are rows [out][in_stride], each a whole number of vectors, so
// there are no tails along the inputs; every kernel is a tile of accumulators in registers.
#pragma once

#include "simd/step.h"
#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

// Accumulators plus operands fill the register file: 6 x 4 + 6 + 1 of 32, 3 x 4 + 3 + 1 of 16.
constexpr int kDotRows = kManyRegisters ? 6 : 3;
constexpr int kDotCols = 4;
constexpr int kTileRows = 6;
constexpr int kTileCols = kManyRegisters ? 4 : 2;

// z[r][c] = start + <x row r, w row c> over n inputs; `bias` null continues from z.
template <int R, int C>
void dot_tile(const float* x, const float* w, ptrdiff_t stride, int n, const float* bias, float* z,
              ptrdiff_t z_stride, bool relu) {
  V a[R][C] = {};
  for (int i = 0; i < n; i += W) {
    V in[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) in[r] = load(x + r * stride + i);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      V weight = load(w + c * stride + i);
      keep(weight);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) a[r][c] += in[r] * weight;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    float* out = z + r * z_stride;
    if constexpr (C == 4) {
      V4 total = sums(a[r][0], a[r][1], a[r][2], a[r][3]) + load4(bias ? bias : out);
      store4(out, relu ? rectify(total) : total);
    } else {
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        float total = sum(a[r][c]) + (bias ? bias[c] : out[c]);
        out[c] = relu && total < 0.f ? 0.f : total;
      }
    }
  }
}

using DotTile = void (*)(const float*, const float*, ptrdiff_t, int, const float*, float*,
                         ptrdiff_t, bool);

template <int C>
EDGELEARN_INLINE DotTile dot_tile_of(int rows) {
  static constexpr DotTile few[] = {dot_tile<1, C>, dot_tile<2, C>, dot_tile<3, C>};
  if constexpr (kDotRows > 3) {
    static constexpr DotTile many[] = {dot_tile<4, C>, dot_tile<5, C>, dot_tile<6, C>};
    if (rows > 3) return many[rows - 4];
  }
  return few[rows - 1];
}

EDGELEARN_INLINE DotTile dot_tile_of(int rows, int cols) {
  switch (cols) {
    case 1:
      return dot_tile_of<1>(rows);
    case 2:
      return dot_tile_of<2>(rows);
    case 3:
      return dot_tile_of<3>(rows);
    default:
      return dot_tile_of<4>(rows);
  }
}

alignas(64) inline constexpr float kZeros[16] = {};

inline void linear_forward(const LinearForward& p) {
  // A block of all inputs of the batch stays in the first-level cache while weights stream by.
  int block = larger(smaller(6144 / larger(p.batch, 1), 1024) / W * W, 8 * W);
  if (p.in_stride <= block + block / 4) block = p.in_stride;
  for (int i = 0; i < p.in_stride; i += block) {
    int n = smaller(block, p.in_stride - i);
    bool first = i == 0, last = i + n == p.in_stride;
    for (int o = 0; o < p.out; o += kDotCols) {
      int cols = smaller(kDotCols, p.out - o);
      const float* bias = !first ? nullptr : p.bias ? p.bias + o : kZeros;
      const float* w = p.weights + static_cast<size_t>(o) * p.in_stride + i;
      split_evenly(p.batch, kDotRows, [&](int row, int rows) {
        dot_tile_of(rows, cols)(p.x + static_cast<size_t>(row) * p.in_stride + i, w, p.in_stride, n,
                                bias, p.z + static_cast<size_t>(row) * p.out_stride + o,
                                p.out_stride, p.relu && last);
      });
    }
  }
}

// dx[r][c] (+)= sum over n outputs of d[r][o] * w[o][c]
template <int R, int C>
void input_tile(const LinearBackward& p, int row, int begin, int n, int i) {
  const float* d = p.d + static_cast<size_t>(row) * p.d_stride + begin;
  const float* w = p.weights + static_cast<size_t>(begin) * p.in_stride + i;
  float* dx = p.dx + static_cast<size_t>(row) * p.in_stride + i;
  V a[R][C] = {};
  if (begin > 0) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) a[r][c] = load(dx + static_cast<size_t>(r) * p.in_stride + c * W);
  }
  for (int o = 0; o < n; o++, w += p.in_stride) {
    V weight[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      weight[c] = load(w + c * W);
      keep(weight[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V factor = splat(d[static_cast<size_t>(r) * p.d_stride + o]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) a[r][c] += factor * weight[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) store(dx + static_cast<size_t>(r) * p.in_stride + c * W, a[r][c]);
}

// Weights of R outputs and C vectors of inputs: their gradient and their step, in registers.
template <int R, int C, Terms kTerms>
void weight_tile(const LinearBackward& p, int o, int i) {
  const Step& s = *p.step;
  const size_t at = p.weights_at + static_cast<size_t>(o) * p.in_stride + i;
  V a[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      a[r][c] = begin_step<kTerms>(s, at + static_cast<size_t>(r) * p.in_stride + c * W);
    }
  }
  const float* x = p.x + i;
  const float* d = p.d + o;
  for (int b = 0; b < p.batch; b++, x += p.in_stride, d += p.d_stride) {
    V in[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      in[c] = load(x + c * W);
      keep(in[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V factor = splat(d[r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        if constexpr (kSign<kTerms> < 0) {
          a[r][c] -= factor * in[c];
        } else {
          a[r][c] += factor * in[c];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const size_t here = at + static_cast<size_t>(r) * p.in_stride + c * W;
      V result = end_step<kTerms>(s, here, a[r][c]);
      if (p.update) {
        store_up_to(p.update + static_cast<size_t>(o + r) * p.in + i + c * W,
                    result - load(s.initial + here), p.in - i - c * W);
      } else {
        store(s.result + here, result);
      }
    }
}

using InputTile = void (*)(const LinearBackward&, int, int, int, int);
using WeightTile = void (*)(const LinearBackward&, int, int);

template <int C>
EDGELEARN_INLINE InputTile input_tile_of(int rows) {
  static constexpr InputTile tiles[] = {input_tile<1, C>, input_tile<2, C>, input_tile<3, C>,
                                        input_tile<4, C>, input_tile<5, C>, input_tile<6, C>};
  return tiles[rows - 1];
}

EDGELEARN_INLINE InputTile input_tile_of(int rows, int cols) {
  if constexpr (kTileCols > 2) {
    if (cols == 4) return input_tile_of<4>(rows);
    if (cols == 3) return input_tile_of<3>(rows);
  }
  return cols == 2 ? input_tile_of<2>(rows) : input_tile_of<1>(rows);
}

template <int C, Terms kTerms>
EDGELEARN_INLINE WeightTile weight_tile_of(int rows) {
  static constexpr WeightTile tiles[] = {weight_tile<1, C, kTerms>, weight_tile<2, C, kTerms>,
                                         weight_tile<3, C, kTerms>, weight_tile<4, C, kTerms>,
                                         weight_tile<5, C, kTerms>, weight_tile<6, C, kTerms>};
  return tiles[rows - 1];
}

template <Terms kTerms>
EDGELEARN_INLINE WeightTile weight_tile_of(int rows, int cols) {
  if constexpr (kTileCols > 2) {
    if (cols == 4) return weight_tile_of<4, kTerms>(rows);
    if (cols == 3) return weight_tile_of<3, kTerms>(rows);
  }
  return cols == 2 ? weight_tile_of<2, kTerms>(rows) : weight_tile_of<1, kTerms>(rows);
}

template <Terms kTerms>
void linear_backward_as(const LinearBackward& p) {
  // A block of weights, inputs and input gradients fits the first-level cache.
  const int vectors = p.in_stride / W;
  const int block = larger(smaller(4096 / larger(p.batch, 1), p.dx ? 256 : 1024) / W, kTileCols);
  const int out_block = p.dx ? 18 : p.out;
  split_evenly(vectors, block, [&](int first, int count) {
    for (int o = 0; o < p.out; o += out_block) {
      const int outs = smaller(out_block, p.out - o);
      if (p.dx) {
        split_evenly(count, kTileCols, [&](int begin, int cols) {
          split_evenly(p.batch, kTileRows, [&](int row, int rows) {
            input_tile_of(rows, cols)(p, row, o, outs, (first + begin) * W);
          });
        });
      }
      if (!p.step) continue;
      split_evenly(outs, kTileRows, [&](int begin, int rows) {
        split_evenly(count, kTileCols, [&](int col, int cols) {
          weight_tile_of<kTerms>(rows, cols)(p, o + begin, (first + col) * W);
        });
      });
    }
  });
}

inline void linear_backward(const LinearBackward& p) {
  switch (p.step ? terms_of(*p.step) : Terms::kNone) {
    case Terms::kNone:
      return linear_backward_as<Terms::kNone>(p);
    case Terms::kNoBuffer:
      return linear_backward_as<Terms::kNoBuffer>(p);
    case Terms::kMomentum:
      return linear_backward_as<Terms::kMomentum>(p);
    case Terms::kCharge:
      return linear_backward_as<Terms::kCharge>(p);
  }
}

}  // namespace edgelearn::EDGELEARN_ISA
