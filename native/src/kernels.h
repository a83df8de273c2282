// The seam between the network, compiled once, and the kernels, compiled per instruction set.
// Plain data and function pointers only, so that nothing inline is shared between the two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgelearn {

// How a gradient changes weights, and what that is charged with. All vectors are packed alike (see Plan), so one offset is good
// for each of them. The gradient arrives multiplied by the learning rate; so does `momentum`.
struct Step {
  const float* theta;    // the weights before the step
  float* result;         // and after it; may be theta
  const float* initial;  // the global model, where the device began
  float* momentum;       // or null
  const float* pull;     // implicit quadratic: theta += pull * (anchor - theta); or null
  const float* anchor;
  float* charge;  // path integral: charge -= gradient of the loss and the proximal term * step; or null
  float inverse_lr;  // of the charge: there the gradient counts as it is
  float momentum_factor;  // 0 in the first step, whatever the buffer holds
  float decay;            // lr * weight_decay
  float proximal;         // lr * proximal_mu
  bool plain;             // nothing but theta - gradient
};

// z = x w^T + bias, perhaps rectified. Strides are in floats; x and w have zeros in their padding.
struct LinearForward {
  int batch, in_stride, out, out_stride;
  const float* x;
  const float* weights;
  const float* bias;  // padded; or null
  float* z;
  bool relu;
};

// Gradient of the inputs, then the step of the weights, block by block while they are in cache.
struct LinearBackward {
  int batch, in, in_stride, out, d_stride;
  const float* x;
  const float* d;
  const float* weights;  // before the step
  float* dx;             // or null: nobody needs it
  const Step* step;      // or null: weights stay
  size_t weights_at;     // offset of the weights in the step's vectors
  float* update;         // the last step: result - initial goes here, unpadded; else null
};

// A convolution of stride 1 with what follows it. Images are [row][column][channel]; the input
// has its padding around it. `run` is what one output sees of one input row: contiguous.
struct ConvShape {
  int in_channels, out_channels, kernel_h, kernel_w;
  int in_row;              // floats in a padded input row
  int out_rows, out_cols;  // after pooling
  int out_row;             // floats between output rows; a pixel has out_channels
  int run, run_stride;     // kernel_w * in_channels, and padded to whole vectors
  bool relu, pool;
};

struct ConvForward {
  const float* x;       // padded image
  const float* packed;  // weights from conv_pack
  const float* bias;    // padded; or null
  float* out;
  int32_t* window;  // [cell][channel]: where the winner's window begins in x; pooling only
  float* partial;   // scratch, conv_partial_floats
};

struct Nonzero {
  float gradient;
  int32_t window;
};

struct ConvBackward {
  const float* x;
  const float* weights;  // [out_channel][kernel_h][run_stride]
  const float* out;
  const float* d_out;  // laid out like `out`
  const int32_t* window;
  float* dx;              // laid out like x and added to; or null
  float* d_weights;       // laid out like weights and added to; padding becomes garbage
  float* d_bias;          // added to; or null
  Nonzero* nonzeros;      // scratch [out_channels][cells]
  int32_t* num_nonzeros;  // scratch [out_channels]
};

// Cross-entropy and its gradient, in place of the logits.
struct CrossEntropy {
  int batch, classes, stride;
  float* z;                    // in: logits; out: gradient * scale
  const int64_t* y;            // labels
  const float* weight;         // of each sample in the loss
  float scale;                 // of the gradient (the learning rate)
  const uint8_t* masks;        // [classes][classes]: allowed beside a label; or null
  const float* const* stored;  // logits to stay close to, by sample, null where none; or null
  float distill;               // factor of each squared difference
  float* scratch;              // [stride]
};

struct Kernels {
  int width;  // floats in a vector; paddings are multiples of it
  void (*linear_forward)(const LinearForward&);
  void (*linear_backward)(const LinearBackward&);
  void (*step_range)(const Step&, const float* gradient, size_t begin, size_t size);
  void (*pull_weights)(float* curvature, float strength, size_t size);
  void (*conv_pack)(const ConvShape&, const float* weights, float* packed);
  size_t (*conv_packed_floats)(const ConvShape&);
  size_t (*conv_partial_floats)(const ConvShape&);
  void (*conv_forward)(const ConvShape&, const ConvForward&);
  void (*conv_backward)(const ConvShape&, const ConvBackward&);
  double (*cross_entropy)(const CrossEntropy&);
  void (*rectify_gradient)(float* d, const float* h, size_t size);  // d = 0 where h <= 0
  void (*square)(const float* x, float factor, float* out, size_t size);
  void (*add_square)(const float* x, float* sum, size_t size);
  void (*transpose)(const float* in, int rows, int cols, float* out);
  void (*axpy)(const float* x, float factor, float* sum, size_t size);
  double (*squared_norm)(const float* x, size_t size, bool* finite);
};

}  // namespace edgelearn
