// Training of many devices, each from the same weights on its own samples.
#pragma once

#include <cstdint>

#include "data.h"
#include "plan.h"

namespace edgelearn {

struct FitArguments {
  const float* params;  // [P]
  float* updates;       // [K, P]
  int64_t num_devices;  // K
  const int32_t* ids;   // of device k: ids[starts[k]:starts[k + 1]]
  const int64_t* starts;
  const uint64_t* seeds;
  const uint64_t* draw_seeds;  // may be null without replay
  int64_t epochs, batch_size;
  float lr, momentum, weight_decay, proximal_mu;

  // Implicit quadratic pull: addresses of float vectors [pull_size], or 0; null if none has any.
  const uint64_t* curvature;
  const uint64_t* anchor;
  size_t pull_size;
  float strength;

  // Path integral: each device's row is added to; null if none is kept.
  float* charge;  // [K, charge_size]
  size_t charge_size;

  const int32_t* replay_ids;  // or null
  const int64_t* replay_starts;
  int64_t replay_batch;  // 0: as many as arrive
  double replay_share;   // negative: every sample weighs the same
  const float* logits;   // [len(replay_ids), C], or null
  double distill_weight;

  int num_threads;
  double* loss;  // [K]
  int64_t* steps;
  int64_t* passed;
};

// Trains all devices. The result does not depend on the number of threads.
void fit(const Plan& plan, const Data& data, const FitArguments& arguments);

// Logits [n, C] of samples.
void forward(const Plan& plan, const Data& data, const float* params, const int32_t* ids, int64_t n,
             int64_t batch_size, int num_threads, float* logits);

// Empirical Fisher [K, size] of each device: the mean of squared per-example gradients over its
// first `max_samples` samples (0: all). Elements that belong to no tensor are 0.
void fisher(const Plan& plan, const Data& data, const float* params, int64_t num_devices,
            const int32_t* ids, const int64_t* starts, int64_t max_samples, size_t size,
            int num_threads, float* out);

}  // namespace edgelearn
