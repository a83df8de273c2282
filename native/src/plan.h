// What a network computes, and where its weights are.
//
// Weights have two layouts: the flat vector that the world sees, [P], tensors as in torch; and a
// packed one for the kernels, where every row is padded with zeros to whole vectors and begins on
// a vector's boundary. Devices train in the packed layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "isa.h"

namespace edgelearn {

// One layer as the caller names it.
struct LayerSpec {
  std::string kind;
  std::vector<int64_t> args;
};

struct ConvStage {
  ConvShape shape;
  int pad_h, pad_w;
  int in_rows, in_cols;  // without padding
  int64_t flat_weight, flat_bias;
  size_t weight_at, bias_at;  // packed
  size_t image_floats;        // of a padded input, with room for the last vector's end
  size_t out_floats;          // of an unpadded output
};

struct LinearStage {
  int in, in_stride, out, out_stride;
  bool relu;
  int64_t flat_weight, flat_bias;
  size_t weight_at, bias_at;
};

class Plan {
 public:
  // Throws std::invalid_argument for what no kernel does.
  Plan(std::vector<int64_t> input_shape, int64_t num_params, const std::vector<LayerSpec>& layers,
       const std::string& isa);

  const Kernels& kernels() const { return *isa_.kernels; }
  const std::string& isa() const { return isa_.name; }
  const std::vector<ConvStage>& convs() const { return convs_; }
  const std::vector<LinearStage>& linears() const { return linears_; }
  size_t num_params() const { return num_params_; }
  size_t packed_size() const { return packed_size_; }
  size_t conv_size() const { return conv_size_; }  // convolutions come first
  size_t num_features() const { return num_features_; }
  int num_classes() const { return linears_.back().out; }

  // Flat to packed, of elements before `limit`. The rest and the padding keep what they hold.
  void pack(const float* flat, size_t limit, float* packed) const;

  // flat = (packed - minus) * factor for all tensors, or all but the weights of linear layers;
  // `minus` null is 0. Elements from `limit` on are left out. Other elements are not touched.
  void unpack(const float* packed, const float* minus, float factor, size_t limit,
              bool with_linear_weights, float* flat) const;

  // Zero the elements of a flat vector below `limit` that belong to no tensor.
  void zero_rest(float* flat, size_t limit) const;

 private:
  template <typename F>
  void each_run(bool with_linear_weights, F&& f) const;
  void claim(const std::string& what, int64_t offset, int64_t size);
  size_t reserve(size_t floats);

  Isa isa_;
  size_t num_params_, num_features_ = 0, packed_size_ = 0, conv_size_ = 0;
  std::vector<ConvStage> convs_;
  std::vector<LinearStage> linears_;
  struct Range {
    size_t begin, end;
  };
  std::vector<Range> tensors_;  // by offset, once complete
};

}  // namespace edgelearn
