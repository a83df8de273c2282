// Convolution, rectifier and 2x2 pooling as one operation.
//
// Forward: a tile of pixels times a block of output channels stays in registers from the bias to
// the pooled value. Backward: pooling passes one gradient of four on and the rectifier drops more,
// so the gradients that are not zero are listed by channel and only those are multiplied.
#pragma once

#include "simd/vector.h"

namespace edgelearn::EDGELEARN_ISA {

constexpr int kBlockVectors = 2;                       // of output channels at a time
constexpr int kPooledCols = kManyRegisters ? 4 : 2;    // of 2-row tiles, in conv outputs
constexpr int kRowCols = kManyRegisters ? 8 : 4;       // of 1-row tiles
constexpr int kRunVectors = kManyRegisters ? 12 : 10;  // of a window's row, backward
constexpr int kChunkFloats = 5120;                     // weights to keep in the first-level cache
constexpr int kTallRows = 7;                           // kernel rows at once if a run is a vector

EDGELEARN_INLINE int channel_vectors(const ConvShape& s) { return (s.out_channels + W - 1) / W; }

inline size_t conv_packed_floats(const ConvShape& s) {
  return static_cast<size_t>(channel_vectors(s)) * W * s.kernel_h * s.run;
}

inline size_t conv_partial_floats(const ConvShape& s) {
  const size_t pixels = static_cast<size_t>(s.out_rows) * s.out_cols * (s.pool ? 4 : 1);
  return pixels * kBlockVectors * W;
}

// [out_channel][kernel_h][run] to [block][kernel_h][run][channel in block].
inline void conv_pack(const ConvShape& s, const float* weights, float* packed) {
  const size_t filter = static_cast<size_t>(s.kernel_h) * s.run_stride;
  const int padded = channel_vectors(s) * W;
  for (int o = 0; o < padded; o += kBlockVectors * W) {
    const int block = smaller(kBlockVectors * W, padded - o);
    const int real = smaller(block, s.out_channels - o);
    for (int y = 0; y < s.kernel_h; y++) {
      const float* from = weights + o * filter + static_cast<size_t>(y) * s.run_stride;
      for (int k = 0; k < s.run; k++, packed += block) {
        for (int c = 0; c < real; c++) packed[c] = from[c * filter + k];
        for (int c = real; c < block; c++) packed[c] = 0.f;
      }
    }
  }
}

struct ConvTile {
  const float* x;
  const float* weights;
  int kernel_rows;  // of this chunk
  const float* bias;
  float* partial;
  bool first, last;
  float* out;
  int32_t* window;
  int32_t origin;  // where the tile's first window begins
  int channels;    // that are real
};

// Rows x cols conv outputs by C vectors of channels.
template <int kRows, int kCols, int C>
void conv_tile(const ConvShape& s, const ConvTile& t) {
  constexpr int kPixels = kRows * kCols;
  const ptrdiff_t row = s.in_row, pixel = s.in_channels;
  V a[kPixels][C];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; p++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      a[p][c] = !t.first ? load(t.partial + (p * C + c) * W) : t.bias ? load(t.bias + c * W) : V{};
    }
  const float* w = t.weights;
  for (int y = 0; y < t.kernel_rows; y++) {
    const float* x = t.x + y * row;
    for (const float* end = x + s.run; x < end; x++, w += C * W) {
      V weight[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        weight[c] = load(w + c * W);
        keep(weight[c]);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; p++) {
        V in = splat(x[(p / kCols) * row + (p % kCols) * pixel]);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) a[p][c] += in * weight[c];
      }
    }
  }
  if (!t.last) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; p++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) store(t.partial + (p * C + c) * W, a[p][c]);
    return;
  }
  if constexpr (kRows == 1) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; p++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        store_up_to(t.out + static_cast<ptrdiff_t>(p) * s.out_channels + c * W,
                    s.relu ? rectify(a[p][c]) : a[p][c], t.channels - c * W);
      }
  } else {
#pragma GCC unroll 8
    for (int q = 0; q < kCols / 2; q++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        // In the order of torch, so that ties fall alike; a NaN wins, so that it is seen.
        V best = a[2 * q][c];
        VI window = splat(static_cast<int32_t>(t.origin + 2 * q * pixel));
        const V others[3] = {a[2 * q + 1][c], a[kCols + 2 * q][c], a[kCols + 2 * q + 1][c]};
        const ptrdiff_t steps[3] = {pixel, row, row + pixel};
#pragma GCC unroll 4
        for (int i = 0; i < 3; i++) {
          VI wins = (others[i] > best) | (others[i] != others[i]);
          best = wins ? others[i] : best;
          window = wins ? splat(static_cast<int32_t>(t.origin + 2 * q * pixel + steps[i])) : window;
        }
        const ptrdiff_t to = static_cast<ptrdiff_t>(q) * s.out_channels + c * W;
        store_up_to(t.out + to, s.relu ? rectify(best) : best, t.channels - c * W);
        store_up_to(t.window + to, window, t.channels - c * W);
      }
  }
}

using ConvTileFn = void (*)(const ConvShape&, const ConvTile&);

template <int C>
EDGELEARN_INLINE ConvTileFn conv_tile_of(bool pool, int cols) {
  if (pool) {
    if constexpr (kPooledCols == 4) {
      if (cols == 4) return conv_tile<2, 4, C>;
    }
    return conv_tile<2, 2, C>;
  }
  static constexpr ConvTileFn few[] = {conv_tile<1, 1, C>, conv_tile<1, 2, C>, conv_tile<1, 3, C>,
                                       conv_tile<1, 4, C>};
  if constexpr (kRowCols == 8) {
    static constexpr ConvTileFn many[] = {conv_tile<1, 5, C>, conv_tile<1, 6, C>,
                                          conv_tile<1, 7, C>, conv_tile<1, 8, C>};
    if (cols > 4) return many[cols - 5];
  }
  return few[cols - 1];
}

inline void conv_forward(const ConvShape& s, const ConvForward& p) {
  const int stride = s.pool ? 2 : 1;  // conv outputs per output
  const int padded = channel_vectors(s) * W;
  for (int o = 0; o < padded; o += kBlockVectors * W) {
    const int block = smaller(kBlockVectors * W, padded - o);
    const float* weights = p.packed + static_cast<size_t>(o) * s.kernel_h * s.run;
    const int chunk = larger(1, kChunkFloats / (s.run * block));
    for (int y = 0; y < s.kernel_h; y += chunk) {
      ConvTile tile{};
      tile.weights = weights + static_cast<size_t>(y) * s.run * block;
      tile.kernel_rows = smaller(chunk, s.kernel_h - y);
      tile.bias = p.bias ? p.bias + o : nullptr;
      tile.first = y == 0;
      tile.last = y + tile.kernel_rows == s.kernel_h;
      tile.channels = s.out_channels - o;
      float* partial = p.partial;
      for (int row = 0; row < s.out_rows; row++) {
        split_evenly(s.out_cols, s.pool ? kPooledCols / 2 : kRowCols, [&](int col, int cols) {
          tile.origin = stride * (row * s.in_row + col * s.in_channels);
          tile.x = p.x + tile.origin + static_cast<ptrdiff_t>(y) * s.in_row;
          tile.partial = partial;
          tile.out = p.out + static_cast<ptrdiff_t>(row) * s.out_row +
                     static_cast<ptrdiff_t>(col) * s.out_channels + o;
          if (s.pool) {
            tile.window =
                p.window + (static_cast<ptrdiff_t>(row) * s.out_cols + col) * s.out_channels + o;
          }
          ConvTileFn fn = block == W ? conv_tile_of<1>(s.pool, stride * cols)
                                     : conv_tile_of<2>(s.pool, stride * cols);
          fn(s, tile);
          partial += static_cast<ptrdiff_t>(stride) * stride * cols * block;
        });
      }
    }
  }
}

// One channel's gradients against kRows rows of J vectors of its windows. The weights' gradient
// stays in registers over all windows.
template <int kRows, int J>
void weights_from_nonzeros(const Nonzero* begin, const Nonzero* end, const float* x, ptrdiff_t row,
                           ptrdiff_t run_stride, float* d_weights) {
  V a[kRows][J];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int j = 0; j < J; j++) a[r][j] = load(d_weights + r * run_stride + j * W);
  for (; begin < end; begin++) {
    V g = splat(begin->gradient);
    const float* from = x + begin->window;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int j = 0; j < J; j++) a[r][j] += g * load(from + r * row + j * W);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int j = 0; j < J; j++) store(d_weights + r * run_stride + j * W, a[r][j]);
}

template <int kRows, int J>
void inputs_from_nonzeros(const Nonzero* begin, const Nonzero* end, float* dx, ptrdiff_t row,
                          ptrdiff_t run_stride, const float* weights) {
  V w[kRows][J];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int j = 0; j < J; j++) {
      w[r][j] = load(weights + r * run_stride + j * W);
      keep(w[r][j]);
    }
  for (; begin < end; begin++) {
    V g = splat(begin->gradient);
    float* to = dx + begin->window;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int j = 0; j < J; j++) {
        store(to + r * row + j * W, load(to + r * row + j * W) + g * w[r][j]);
      }
  }
}

using WeightsFn = void (*)(const Nonzero*, const Nonzero*, const float*, ptrdiff_t, ptrdiff_t,
                           float*);
using InputsFn = void (*)(const Nonzero*, const Nonzero*, float*, ptrdiff_t, ptrdiff_t,
                          const float*);

struct NonzeroKernels {
  WeightsFn weights;
  InputsFn inputs;
};

template <int kRows, int J>
inline constexpr NonzeroKernels kNonzero = {weights_from_nonzeros<kRows, J>,
                                            inputs_from_nonzeros<kRows, J>};

EDGELEARN_INLINE NonzeroKernels nonzero_kernels(int rows, int vectors) {
  static constexpr NonzeroKernels tall[] = {kNonzero<1, 1>, kNonzero<2, 1>, kNonzero<3, 1>,
                                            kNonzero<4, 1>, kNonzero<5, 1>, kNonzero<6, 1>,
                                            kNonzero<7, 1>};
  static constexpr NonzeroKernels wide[] = {kNonzero<1, 2>, kNonzero<1, 3>, kNonzero<1, 4>,
                                            kNonzero<1, 5>, kNonzero<1, 6>, kNonzero<1, 7>,
                                            kNonzero<1, 8>, kNonzero<1, 9>, kNonzero<1, 10>};
  if constexpr (kRunVectors > 10) {
    if (vectors == 12) return kNonzero<1, 12>;
    if (vectors == 11) return kNonzero<1, 11>;
  }
  return vectors == 1 ? tall[rows - 1] : wide[vectors - 2];
}

// Lists each channel's gradients that pass the rectifier, with their windows.
inline void list_nonzeros(const ConvShape& s, const ConvBackward& p) {
  const int channels = s.out_channels, cells = s.out_rows * s.out_cols;
  for (int o = 0; o < channels; o++) p.num_nonzeros[o] = 0;
  for (int row = 0, cell = 0; row < s.out_rows; row++) {
    for (int col = 0; col < s.out_cols; col++, cell++) {
      const ptrdiff_t at =
          static_cast<ptrdiff_t>(row) * s.out_row + static_cast<ptrdiff_t>(col) * channels;
      const float *h = p.out + at, *d = p.d_out + at;
      const int32_t* window = s.pool ? p.window + static_cast<ptrdiff_t>(cell) * channels : nullptr;
      const int32_t origin = row * s.in_row + col * s.in_channels;
      Nonzero* list = p.nonzeros;
      for (int o = 0; o < channels; o++, list += cells) {
        const int n = p.num_nonzeros[o];
        list[n] = {d[o], window ? window[o] : origin};  // overwritten by the next if it is zero
        p.num_nonzeros[o] = n + ((s.relu ? !(h[o] <= 0.f) : true) & (d[o] != 0.f));
      }
    }
  }
}

inline void conv_backward(const ConvShape& s, const ConvBackward& p) {
  list_nonzeros(s, p);
  const int cells = s.out_rows * s.out_cols;
  const int vectors = s.run_stride / W;
  for (int o = 0; o < s.out_channels; o++) {
    const Nonzero* begin = p.nonzeros + static_cast<size_t>(o) * cells;
    const Nonzero* end = begin + p.num_nonzeros[o];
    if (begin == end) continue;
    if (p.d_bias) {
      float total = 0.f;
      for (const Nonzero* n = begin; n < end; n++) total += n->gradient;
      p.d_bias[o] += total;
    }
    const size_t filter = static_cast<size_t>(o) * s.kernel_h * s.run_stride;
    split_evenly(s.kernel_h, vectors == 1 ? kTallRows : 1, [&](int y, int rows) {
      split_evenly(vectors, kRunVectors, [&](int j, int count) {
        const NonzeroKernels kernels = nonzero_kernels(rows, count);
        const ptrdiff_t in = static_cast<ptrdiff_t>(y) * s.in_row + j * W;
        const size_t at = filter + static_cast<size_t>(y) * s.run_stride + j * W;
        if (p.dx) kernels.inputs(begin, end, p.dx + in, s.in_row, s.run_stride, p.weights + at);
        kernels.weights(begin, end, p.x + in, s.in_row, s.run_stride, p.d_weights + at);
      });
    });
  }
}

}  // namespace edgelearn::EDGELEARN_ISA
