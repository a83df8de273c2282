// One thread's copy of a network: activations, gradients and the kernels' scratch.
#pragma once

#include <vector>

#include "arena.h"
#include "plan.h"

namespace edgelearn {

// What weighs the samples of a batch, and what else pulls their logits.
struct LossTerms {
  const int64_t* y;
  const float* weight;
  float scale;  // of the gradient
  const uint8_t* masks = nullptr;
  const float* const* stored = nullptr;
  float distill = 0.f;
};

class Network {
 public:
  // Buffers for batches of up to `max_batch` are cut from `arena`, which nobody else may use while
  // this lives. A network that only predicts needs no buffers for gradients.
  Network(const Plan& plan, int max_batch, bool trains, Arena& arena);

  // Puts a sample's features, in the order of the data set, at its place in the batch.
  void set_input(int sample, const float* features);
  float* features() { return features_; }  // scratch [num_features]

  // Logits of the first `batch` samples, in rows of stride(), from packed weights.
  void forward(int batch, const float* theta);
  const float* logits() const { return logits_; }
  int logits_stride() const { return plan_.linears().back().out_stride; }

  // After `forward`: turns the logits into their gradient and returns the loss.
  double loss(int batch, const LossTerms& terms);

  // After `loss`: a step of all weights. With `update` (a flat vector), weights of linear layers
  // go there as differences to `step.initial`, not to `step.result`.
  void step(int batch, const Step& step, float* update);

  // After `loss`: adds the squares of each sample's gradient to `sum`, packed.
  void add_squared_gradients(int batch, const float* theta, float* sum);

 private:
  void cut(Cutter& cutter);
  void convs_forward(int batch, const float* theta);
  void conv_gradients(int sample, const float* theta, const float* d_flat);
  void clear_conv_padding();
  float* out_of(size_t conv, int sample);

  const Plan& plan_;
  const Kernels& kernels_;
  const int max_batch_;
  const bool trains_;

  struct ConvBuffers {
    float* in;        // [batch][image_floats]; zeros around the image
    float* packed;    // forward weights
    int32_t* window;  // [batch][out_floats]
    float* d_in;      // [image_floats], of one sample; not for the first
  };
  std::vector<ConvBuffers> convs_;
  std::vector<float*> ins_;  // of linear layers, [batch][in_stride]; zeros in the padding
  float* features_ = nullptr;
  float* logits_ = nullptr;
  float* last_image_ = nullptr;    // [batch][out_floats] of the last convolution
  float* d_last_image_ = nullptr;  // of one sample
  float* partial_ = nullptr;
  Nonzero* nonzeros_ = nullptr;
  int32_t* num_nonzeros_ = nullptr;
  float* conv_gradient_ = nullptr;  // [conv_size]
  float* d_ins_[2] = {nullptr, nullptr};
  float* bias_gradient_ = nullptr;
  float* squares_[2] = {nullptr, nullptr};
  float* scratch_ = nullptr;
};

}  // namespace edgelearn
