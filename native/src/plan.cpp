#include "plan.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <stdexcept>

#include "arena.h"

namespace edgelearn {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Keeps every product of sizes below in range.
constexpr int64_t kLargest = 1 << 24;

}  // namespace

size_t Plan::reserve(size_t floats) {
  const size_t at = packed_size_;
  packed_size_ += padded(floats, kLine / sizeof(float));
  return at;
}

void Plan::claim(const std::string& what, int64_t offset, int64_t size) {
  if (offset < 0 || offset + size > static_cast<int64_t>(num_params_)) {
    refuse(what + " takes elements " + std::to_string(offset) + " to " +
           std::to_string(offset + size) + " of " + std::to_string(num_params_) + " parameters");
  }
  tensors_.push_back({static_cast<size_t>(offset), static_cast<size_t>(offset + size)});
}

Plan::Plan(std::vector<int64_t> input_shape, int64_t num_params,
           const std::vector<LayerSpec>& layers, const std::string& isa)
    : isa_(choose_isa(isa)), num_params_(static_cast<size_t>(num_params)) {
  if (num_params < 1) refuse("num_params is " + std::to_string(num_params) + "; at least 1");
  if (input_shape.size() != 1 && input_shape.size() != 3) {
    refuse("input_shape has " + std::to_string(input_shape.size()) +
           " dimensions; allowed: (D,) and (C, H, W)");
  }
  num_features_ = 1;
  for (int64_t size : input_shape) {
    if (size < 1 || size > kLargest) refuse("input_shape has a size of " + std::to_string(size));
    num_features_ *= static_cast<size_t>(size);
    if (num_features_ > kLargest) refuse("input_shape is too large");
  }
  const int width = kernels().width;
  std::vector<int64_t> shape = input_shape;  // of what the next layer gets
  // What a rectifier or a pooling may still join: the layer before, unless it was flattened.
  enum class Before { kNothing, kConv, kLinear } before = Before::kNothing;

  for (size_t i = 0; i < layers.size(); i++) {
    const LayerSpec& layer = layers[i];
    const std::string name = "layer " + std::to_string(i) + " (" + layer.kind + ")";
    const auto need = [&](size_t count) {
      if (layer.args.size() != count) {
        refuse(name + " has " + std::to_string(layer.args.size()) + " arguments, expected " +
               std::to_string(count));
      }
    };
    if (layer.kind == "conv2d") {
      need(7);
      if (shape.size() != 3) refuse(name + " needs an input of shape (C, H, W)");
      const auto& a = layer.args;
      for (size_t j = 2; j < 7; j++) {
        if (a[j] < (j < 5 ? 1 : 0) || a[j] > 65536)
          refuse(name + ": a size of " + std::to_string(a[j]));
      }
      const int64_t rows = shape[1] + 2 * a[5] - a[3] + 1, cols = shape[2] + 2 * a[6] - a[4] + 1;
      if (rows < 1 || cols < 1) refuse(name + ": the kernel is larger than the image");
      if ((shape[1] + 2 * a[5]) * (shape[2] + 2 * a[6]) * shape[0] > kLargest * 4 ||
          rows * cols * a[2] > kLargest * 4 || a[3] * a[4] * shape[0] * a[2] > kLargest * 16) {
        refuse(name + " is too large");
      }
      ConvStage c{};
      c.pad_h = static_cast<int>(a[5]);
      c.pad_w = static_cast<int>(a[6]);
      c.in_rows = static_cast<int>(shape[1]);
      c.in_cols = static_cast<int>(shape[2]);
      c.flat_weight = a[0];
      c.flat_bias = a[1];
      ConvShape& s = c.shape;
      s.in_channels = static_cast<int>(shape[0]);
      s.out_channels = static_cast<int>(a[2]);
      s.kernel_h = static_cast<int>(a[3]);
      s.kernel_w = static_cast<int>(a[4]);
      s.in_row = (c.in_cols + 2 * c.pad_w) * s.in_channels;
      s.out_rows = static_cast<int>(rows);
      s.out_cols = static_cast<int>(cols);
      s.run = s.kernel_w * s.in_channels;
      s.run_stride = static_cast<int>(padded(s.run, width));
      c.image_floats = padded(static_cast<size_t>(c.in_rows + 2 * c.pad_h) * s.in_row + 16, 16);
      claim(name + " weight", a[0], a[2] * shape[0] * a[3] * a[4]);
      if (a[1] != -1) claim(name + " bias", a[1], a[2]);
      c.weight_at = reserve(static_cast<size_t>(s.out_channels) * s.kernel_h * s.run_stride);
      c.bias_at = a[1] == -1 ? 0 : reserve(s.out_channels);
      convs_.push_back(c);
      shape = {a[2], rows, cols};
      before = Before::kConv;
    } else if (layer.kind == "relu") {
      need(0);
      if (before == Before::kConv) {
        convs_.back().shape.relu = true;
      } else if (before == Before::kLinear) {
        linears_.back().relu = true;
      } else {
        refuse(name + " has no conv2d or linear before it");
      }
    } else if (layer.kind == "maxpool2d") {
      need(1);
      if (layer.args[0] != 2) refuse(name + ": kernel and stride must be 2");
      if (before != Before::kConv || shape.size() != 3 || convs_.back().shape.pool) {
        refuse(name + " must follow a conv2d, with nothing but a relu between");
      }
      ConvShape& s = convs_.back().shape;
      s.pool = true;
      s.out_rows /= 2;
      s.out_cols /= 2;
      if (s.out_rows < 1 || s.out_cols < 1) refuse(name + " leaves nothing of the image");
      shape = {shape[0], s.out_rows, s.out_cols};
    } else if (layer.kind == "flatten") {
      need(0);
      int64_t size = 1;
      for (int64_t n : shape) size *= n;
      shape = {size};
    } else if (layer.kind == "linear") {
      need(3);
      if (shape.size() != 1) refuse(name + " needs a flattened input");
      const auto& a = layer.args;
      if (a[2] < 1 || a[2] > kLargest) refuse(name + ": out_features is " + std::to_string(a[2]));
      claim(name + " weight", a[0], a[2] * shape[0]);
      if (a[1] != -1) claim(name + " bias", a[1], a[2]);
      if (linears_.empty()) conv_size_ = packed_size_;
      LinearStage l{};
      l.in = static_cast<int>(shape[0]);
      l.in_stride = static_cast<int>(padded(l.in, width));
      l.out = static_cast<int>(a[2]);
      l.out_stride = static_cast<int>(padded(l.out, width));
      l.flat_weight = a[0];
      l.flat_bias = a[1];
      l.weight_at = reserve(static_cast<size_t>(l.out) * l.in_stride);
      l.bias_at = a[1] == -1 ? 0 : reserve(l.out);
      linears_.push_back(l);
      shape = {a[2]};
      before = Before::kLinear;
    } else {
      refuse(name + " is unknown; allowed: conv2d, relu, maxpool2d, flatten, linear");
    }
  }
  if (layers.empty() || layers.back().kind != "linear") refuse("the last layer must be linear");

  for (size_t i = 0; i < convs_.size(); i++) {
    ConvStage& c = convs_[i];
    ConvShape& s = c.shape;
    c.out_floats = static_cast<size_t>(s.out_rows) * s.out_cols * s.out_channels;
    s.out_row = i + 1 < convs_.size() ? convs_[i + 1].shape.in_row : s.out_cols * s.out_channels;
  }
  std::sort(tensors_.begin(), tensors_.end(), [](Range a, Range b) { return a.begin < b.begin; });
  for (size_t i = 1; i < tensors_.size(); i++) {
    if (tensors_[i].begin < tensors_[i - 1].end) {
      refuse("two tensors share element " + std::to_string(tensors_[i].begin) +
             " of the parameters");
    }
  }
}

// Calls f(flat, packed, size) for every stretch that is contiguous in both layouts.
template <typename F>
void Plan::each_run(bool with_linear_weights, F&& f) const {
  for (const ConvStage& c : convs_) {
    const ConvShape& s = c.shape;
    size_t flat = static_cast<size_t>(c.flat_weight);
    for (int o = 0; o < s.out_channels; o++) {
      for (int i = 0; i < s.in_channels; i++) {
        for (int y = 0; y < s.kernel_h; y++) {
          const size_t row =
              c.weight_at + (static_cast<size_t>(o) * s.kernel_h + y) * s.run_stride + i;
          for (int x = 0; x < s.kernel_w; x++) f(flat++, row + x * s.in_channels, size_t{1});
        }
      }
    }
    if (c.flat_bias != -1)
      f(static_cast<size_t>(c.flat_bias), c.bias_at, static_cast<size_t>(s.out_channels));
  }
  for (const LinearStage& l : linears_) {
    if (with_linear_weights) {
      for (size_t o = 0; o < static_cast<size_t>(l.out); o++) {
        f(static_cast<size_t>(l.flat_weight) + o * l.in, l.weight_at + o * l.in_stride,
          static_cast<size_t>(l.in));
      }
    }
    if (l.flat_bias != -1)
      f(static_cast<size_t>(l.flat_bias), l.bias_at, static_cast<size_t>(l.out));
  }
}

void Plan::pack(const float* flat, size_t limit, float* packed) const {
  each_run(true, [&](size_t from, size_t to, size_t size) {
    if (from >= limit) return;
    size = std::min(size, limit - from);
    if (size == 1) {
      packed[to] = flat[from];
    } else {
      std::memcpy(packed + to, flat + from, size * sizeof(float));
    }
  });
}

void Plan::unpack(const float* packed, const float* minus, float factor, size_t limit,
                  bool with_linear_weights, float* flat) const {
  each_run(with_linear_weights, [&](size_t to, size_t from, size_t size) {
    if (to >= limit) return;
    size = std::min(size, limit - to);
    if (minus) {
      for (size_t i = 0; i < size; i++)
        flat[to + i] = (packed[from + i] - minus[from + i]) * factor;
    } else {
      for (size_t i = 0; i < size; i++) flat[to + i] = packed[from + i] * factor;
    }
  });
}

void Plan::zero_rest(float* flat, size_t limit) const {
  size_t at = 0;
  for (const Range& tensor : tensors_) {
    const size_t end = std::min(tensor.begin, limit);
    if (end > at) std::memset(flat + at, 0, (end - at) * sizeof(float));
    at = std::min(tensor.end, limit);
  }
  if (limit > at) std::memset(flat + at, 0, (limit - at) * sizeof(float));
}

}  // namespace edgelearn
