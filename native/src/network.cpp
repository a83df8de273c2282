#include "network.h"

#include <algorithm>
#include <cstring>

namespace edgelearn {

Network::Network(const Plan& plan, int max_batch, bool trains, Arena& arena)
    : plan_(plan),
      kernels_(plan.kernels()),
      max_batch_(max_batch),
      trains_(trains),
      convs_(plan.convs().size()),
      ins_(plan.linears().size()) {
  Cutter measure(nullptr);
  cut(measure);
  arena.reset(measure.used());
  std::memset(arena.data(), 0, measure.used());
  Cutter cutter(arena.data());
  cut(cutter);
}

void Network::cut(Cutter& cutter) {
  const size_t batch = static_cast<size_t>(max_batch_);
  size_t partial = 0, nonzeros = 0, channels = 0, widest = 0;
  for (size_t i = 0; i < convs_.size(); i++) {
    const ConvStage& stage = plan_.convs()[i];
    ConvBuffers& buffers = convs_[i];
    cutter.cut(buffers.in, batch * stage.image_floats);
    cutter.cut(buffers.packed, kernels_.conv_packed_floats(stage.shape));
    cutter.cut(buffers.window, stage.shape.pool ? batch * stage.out_floats : 0);
    cutter.cut(buffers.d_in, trains_ && i > 0 ? stage.image_floats : 0);
    partial = std::max(partial, kernels_.conv_partial_floats(stage.shape));
    nonzeros = std::max(nonzeros, stage.out_floats);
    channels = std::max(channels, static_cast<size_t>(stage.shape.out_channels));
  }
  cutter.cut(partial_, partial);
  if (!convs_.empty()) cutter.cut(last_image_, batch * plan_.convs().back().out_floats);
  for (size_t i = 0; i < ins_.size(); i++) {
    cutter.cut(ins_[i], batch * plan_.linears()[i].in_stride);
    widest = std::max({widest, static_cast<size_t>(plan_.linears()[i].in_stride),
                       static_cast<size_t>(plan_.linears()[i].out_stride)});
  }
  cutter.cut(logits_, batch * logits_stride());
  cutter.cut(features_, plan_.num_features());
  if (!trains_) return;
  cutter.cut(scratch_, static_cast<size_t>(logits_stride()));
  cutter.cut(d_ins_[0], batch * widest);
  cutter.cut(d_ins_[1], batch * widest);
  cutter.cut(squares_[0], batch * widest);
  cutter.cut(squares_[1], batch * widest);
  cutter.cut(bias_gradient_, padded(widest, 16));
  if (convs_.empty()) return;
  cutter.cut(d_last_image_, plan_.convs().back().out_floats);
  cutter.cut(nonzeros_, nonzeros);
  cutter.cut(num_nonzeros_, channels);
  cutter.cut(conv_gradient_, plan_.conv_size());
}

void Network::set_input(int sample, const float* features) {
  if (convs_.empty()) {
    std::memcpy(ins_[0] + static_cast<size_t>(sample) * plan_.linears()[0].in_stride, features,
                plan_.num_features() * sizeof(float));
    return;
  }
  const ConvStage& c = plan_.convs()[0];
  const int channels = c.shape.in_channels;
  float* image = convs_[0].in + sample * c.image_floats + c.pad_h * c.shape.in_row +
                 static_cast<size_t>(c.pad_w) * channels;
  for (int i = 0; i < channels; i++) {
    for (int y = 0; y < c.in_rows; y++, features += c.in_cols) {
      float* row = image + static_cast<size_t>(y) * c.shape.in_row + i;
      for (int x = 0; x < c.in_cols; x++) row[x * channels] = features[x];
    }
  }
}

// Where a convolution's output goes: inside the next one's padded input, or the last image.
float* Network::out_of(size_t conv, int sample) {
  if (conv + 1 == convs_.size()) return last_image_ + sample * plan_.convs()[conv].out_floats;
  const ConvStage& next = plan_.convs()[conv + 1];
  return convs_[conv + 1].in + sample * next.image_floats +
         static_cast<size_t>(next.pad_h) * next.shape.in_row +
         static_cast<size_t>(next.pad_w) * next.shape.in_channels;
}

void Network::convs_forward(int batch, const float* theta) {
  for (size_t i = 0; i < convs_.size(); i++) {
    const ConvStage& stage = plan_.convs()[i];
    kernels_.conv_pack(stage.shape, theta + stage.weight_at, convs_[i].packed);
  }
  const ConvStage& last = plan_.convs().back();
  for (int b = 0; b < batch; b++) {  // a sample at a time: its activations stay in cache
    for (size_t i = 0; i < convs_.size(); i++) {
      const ConvStage& stage = plan_.convs()[i];
      ConvForward pass{};
      pass.x = convs_[i].in + b * stage.image_floats;
      pass.packed = convs_[i].packed;
      pass.bias = stage.flat_bias == -1 ? nullptr : theta + stage.bias_at;
      pass.out = out_of(i, b);
      pass.window = convs_[i].window + (stage.shape.pool ? b * stage.out_floats : 0);
      pass.partial = partial_;
      kernels_.conv_forward(stage.shape, pass);
    }
    // [pixel][channel] to [channel][pixel], as the weights behind a flatten expect.
    kernels_.transpose(out_of(convs_.size() - 1, b), last.shape.out_rows * last.shape.out_cols,
                       last.shape.out_channels,
                       ins_[0] + static_cast<size_t>(b) * plan_.linears()[0].in_stride);
  }
}

void Network::forward(int batch, const float* theta) {
  if (!convs_.empty()) convs_forward(batch, theta);
  for (size_t i = 0; i < ins_.size(); i++) {
    const LinearStage& l = plan_.linears()[i];
    LinearForward pass{};
    pass.batch = batch;
    pass.in_stride = l.in_stride;
    pass.out = l.out;
    pass.out_stride = l.out_stride;
    pass.x = ins_[i];
    pass.weights = theta + l.weight_at;
    pass.bias = l.flat_bias == -1 ? nullptr : theta + l.bias_at;
    pass.z = i + 1 < ins_.size() ? ins_[i + 1] : logits_;
    pass.relu = l.relu;
    kernels_.linear_forward(pass);
  }
}

double Network::loss(int batch, const LossTerms& terms) {
  CrossEntropy pass{};
  pass.batch = batch;
  pass.classes = plan_.num_classes();
  pass.stride = logits_stride();
  pass.z = logits_;
  pass.y = terms.y;
  pass.weight = terms.weight;
  pass.scale = terms.scale;
  pass.masks = terms.masks;
  pass.stored = terms.stored;
  pass.distill = terms.distill;
  pass.scratch = scratch_;
  return kernels_.cross_entropy(pass);
}

// Adds one sample's gradients of all convolutions to conv_gradient_.
void Network::conv_gradients(int sample, const float* theta, const float* d_flat) {
  const ConvShape& last = plan_.convs().back().shape;
  kernels_.transpose(d_flat, last.out_channels, last.out_rows * last.out_cols, d_last_image_);
  for (size_t i = convs_.size(); i-- > 0;) {
    const ConvStage& stage = plan_.convs()[i];
    ConvBackward pass{};
    pass.x = convs_[i].in + sample * stage.image_floats;
    pass.weights = theta + stage.weight_at;
    pass.out = out_of(i, sample);
    pass.d_out = d_last_image_;
    if (i + 1 < convs_.size()) {
      const ConvStage& next = plan_.convs()[i + 1];
      pass.d_out = convs_[i + 1].d_in + static_cast<size_t>(next.pad_h) * next.shape.in_row +
                   static_cast<size_t>(next.pad_w) * next.shape.in_channels;
    }
    pass.window = convs_[i].window + (stage.shape.pool ? sample * stage.out_floats : 0);
    if (i > 0) {
      pass.dx = convs_[i].d_in;
      std::memset(pass.dx, 0, stage.image_floats * sizeof(float));
    }
    pass.d_weights = conv_gradient_ + stage.weight_at;
    pass.d_bias = stage.flat_bias == -1 ? nullptr : conv_gradient_ + stage.bias_at;
    pass.nonzeros = nonzeros_;
    pass.num_nonzeros = num_nonzeros_;
    kernels_.conv_backward(stage.shape, pass);
  }
}

void Network::clear_conv_padding() {
  for (const ConvStage& stage : plan_.convs()) {
    const ConvShape& s = stage.shape;
    if (s.run == s.run_stride) continue;
    for (int row = 0; row < s.out_channels * s.kernel_h; row++) {
      float* run = conv_gradient_ + stage.weight_at + static_cast<size_t>(row) * s.run_stride;
      std::memset(run + s.run, 0, (s.run_stride - s.run) * sizeof(float));
    }
  }
}

void Network::step(int batch, const Step& step, float* update) {
  const float* d = logits_;
  int d_stride = logits_stride();
  for (size_t i = ins_.size(); i-- > 0;) {
    const LinearStage& l = plan_.linears()[i];
    LinearBackward pass{};
    pass.batch = batch;
    pass.in = l.in;
    pass.in_stride = l.in_stride;
    pass.out = l.out;
    pass.d_stride = d_stride;
    pass.x = ins_[i];
    pass.d = d;
    pass.weights = step.theta + l.weight_at;
    pass.dx = i > 0 || !convs_.empty() ? d_ins_[i % 2] : nullptr;
    pass.step = &step;
    pass.weights_at = l.weight_at;
    pass.update = update ? update + l.flat_weight : nullptr;
    kernels_.linear_backward(pass);
    if (l.flat_bias != -1) {
      std::memset(bias_gradient_, 0, padded(l.out, 16) * sizeof(float));
      for (int b = 0; b < batch; b++) {
        kernels_.axpy(d + static_cast<size_t>(b) * d_stride, 1.f, bias_gradient_, l.out);
      }
      kernels_.step_range(step, bias_gradient_, l.bias_at, padded(l.out, 16));
    }
    d = pass.dx;
    d_stride = l.in_stride;
    if (i > 0 && plan_.linears()[i - 1].relu) {
      kernels_.rectify_gradient(d_ins_[i % 2], ins_[i], static_cast<size_t>(batch) * l.in_stride);
    }
  }
  if (convs_.empty()) return;
  std::memset(conv_gradient_, 0, plan_.conv_size() * sizeof(float));
  for (int b = 0; b < batch; b++) {
    conv_gradients(b, step.theta, d + static_cast<size_t>(b) * d_stride);
  }
  clear_conv_padding();
  kernels_.step_range(step, conv_gradient_, 0, plan_.conv_size());
}

void Network::add_squared_gradients(int batch, const float* theta, float* sum) {
  const float* d = logits_;
  int d_stride = logits_stride();
  for (size_t i = ins_.size(); i-- > 0;) {
    const LinearStage& l = plan_.linears()[i];
    LinearBackward pass{};
    pass.batch = batch;
    pass.in = l.in;
    pass.in_stride = l.in_stride;
    pass.out = l.out;
    pass.d_stride = d_stride;
    pass.x = ins_[i];
    pass.d = d;
    pass.weights = theta + l.weight_at;
    pass.dx = i > 0 || !convs_.empty() ? d_ins_[i % 2] : nullptr;
    if (pass.dx) kernels_.linear_backward(pass);
    // A sample's gradient is an outer product, and so is its square. The step subtracts, hence -1.
    kernels_.square(ins_[i], 1.f, squares_[0], static_cast<size_t>(batch) * l.in_stride);
    kernels_.square(d, -1.f, squares_[1], static_cast<size_t>(batch) * d_stride);
    Step add{};
    add.theta = add.result = sum;
    add.plain = true;
    LinearBackward squared = pass;
    squared.x = squares_[0];
    squared.d = squares_[1];
    squared.dx = nullptr;
    squared.step = &add;
    squared.weights_at = l.weight_at;
    kernels_.linear_backward(squared);
    if (l.flat_bias != -1) {
      for (int b = 0; b < batch; b++) {
        kernels_.axpy(squares_[1] + static_cast<size_t>(b) * d_stride, -1.f, sum + l.bias_at,
                      l.out);
      }
    }
    d = pass.dx;
    d_stride = l.in_stride;
    if (i > 0 && plan_.linears()[i - 1].relu) {
      kernels_.rectify_gradient(d_ins_[i % 2], ins_[i], static_cast<size_t>(batch) * l.in_stride);
    }
  }
  if (convs_.empty()) return;
  for (int b = 0; b < batch; b++) {
    std::memset(conv_gradient_, 0, plan_.conv_size() * sizeof(float));
    conv_gradients(b, theta, d + static_cast<size_t>(b) * d_stride);
    clear_conv_padding();
    kernels_.add_square(conv_gradient_, sum, plan_.conv_size());
  }
}

}  // namespace edgelearn
