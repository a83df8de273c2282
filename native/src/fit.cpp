#include "fit.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "network.h"
#include "permutation.h"
#include "workers.h"

namespace edgelearn {

namespace {

Arena& thread_arena(int which) {
  static thread_local Arena arenas[2];
  return arenas[which];
}

// One thread's means to train one device after another.
class Trainer {
 public:
  Trainer(const Plan& plan, const Data& data, const FitArguments& args, const float* initial,
          int max_batch)
      : plan_(plan),
        data_(data),
        args_(args),
        initial_(initial),
        network_(plan, max_batch, true, thread_arena(0)),
        y_(static_cast<size_t>(max_batch)),
        weight_(static_cast<size_t>(max_batch)),
        stored_(static_cast<size_t>(max_batch)) {
    Cutter measure(nullptr);
    cut(measure);
    thread_arena(1).reset(measure.used());
    Cutter cutter(thread_arena(1).data());
    cut(cutter);
    if (pull_) {
      std::memset(pull_, 0, plan_.packed_size() * sizeof(float));
      std::memset(anchor_, 0, plan_.packed_size() * sizeof(float));
    }
    if (charge_) std::memset(charge_, 0, plan_.packed_size() * sizeof(float));
  }

  void train(int64_t k) {
    const int32_t* ids = args_.ids + args_.starts[k];
    const int64_t n = args_.starts[k + 1] - args_.starts[k];
    float* row = args_.updates + static_cast<size_t>(k) * plan_.num_params();
    args_.loss[k] = 0.0;
    args_.steps[k] = args_.passed[k] = 0;
    const int64_t steps = args_.epochs * ((n + args_.batch_size - 1) / args_.batch_size);
    if (steps == 0) {
      std::memset(row, 0, plan_.num_params() * sizeof(float));
      return;
    }
    if (args_.draw_seeds) draws_.restart(args_.draw_seeds[k]);
    Step step = first_step(k);
    double loss = 0.0;
    int64_t done = 0, passed = 0;
    for (int64_t epoch = 0; epoch < args_.epochs; epoch++) {
      const uint32_t* order = shuffles_.all(
          epoch_seed(args_.seeds[k], static_cast<uint64_t>(epoch)), static_cast<size_t>(n));
      for (int64_t begin = 0; begin < n; begin += args_.batch_size) {
        const int arriving = static_cast<int>(std::min(args_.batch_size, n - begin));
        for (int i = 0; i < arriving; i++) put(i, ids[order[begin + i]]);
        const int replayed = replay(k, arriving);
        weigh(arriving, replayed);
        const int batch = arriving + replayed;
        network_.forward(batch, step.theta);
        LossTerms terms{y_.data(), weight_.data(), args_.lr, data_.task_masks};
        if (args_.logits && replayed > 0) {
          terms.stored = stored_.data();
          terms.distill = static_cast<float>(args_.distill_weight /
                                             (static_cast<double>(replayed) * plan_.num_classes()));
        }
        loss += network_.loss(batch, terms);
        done++;
        passed += batch;
        network_.step(batch, step, done == steps ? row : nullptr);
        step.theta = theta_;
        step.momentum_factor = args_.momentum;
      }
    }
    plan_.unpack(theta_, initial_, 1.f, plan_.num_params(), false, row);
    if (charge_) plan_.unpack(charge_, nullptr, 1.f, args_.charge_size, true, charge_of(k));
    plan_.zero_rest(row, plan_.num_params());
    args_.loss[k] = loss / static_cast<double>(steps);
    args_.steps[k] = steps;
    args_.passed[k] = passed;
  }

 private:
  void cut(Cutter& cutter) {
    cutter.cut(theta_, plan_.packed_size());
    if (args_.momentum != 0.f) cutter.cut(momentum_, plan_.packed_size());
    if (args_.curvature && args_.strength != 0.f) {
      cutter.cut(pull_, plan_.packed_size());
      cutter.cut(anchor_, plan_.packed_size());
    }
    if (args_.charge) cutter.cut(charge_, plan_.packed_size());
  }

  float* charge_of(int64_t k) { return args_.charge + static_cast<size_t>(k) * args_.charge_size; }

  // The curvature of a device's pull, or null if it pulls at nothing.
  const float* curvature_of(int64_t k) {
    if (!pull_ || args_.curvature[k] == 0 || args_.anchor[k] == 0) return nullptr;
    const float* found = reinterpret_cast<const float*>(args_.curvature[k]);
    const bool pulls = std::any_of(found, found + args_.pull_size, [](float f) { return f != 0.f; });
    return pulls ? found : nullptr;
  }

  // Reads the global model and writes this device's own: nothing is copied first.
  Step first_step(int64_t k) {
    Step step{};
    step.theta = initial_;
    step.result = theta_;
    step.initial = initial_;
    step.momentum = momentum_;
    step.decay = args_.lr * args_.weight_decay;
    step.proximal = args_.lr * args_.proximal_mu;
    if (const float* curvature = curvature_of(k)) {
      plan_.pack(reinterpret_cast<const float*>(args_.anchor[k]), args_.pull_size, anchor_);
      plan_.pack(curvature, args_.pull_size, pull_);
      plan_.kernels().pull_weights(pull_, args_.lr * args_.strength, plan_.packed_size());
      step.pull = pull_;
      step.anchor = anchor_;
    }
    if (charge_) {
      plan_.pack(charge_of(k), args_.charge_size, charge_);
      step.charge = charge_;
      step.inverse_lr = args_.lr == 0.f ? 0.f : 1.f / args_.lr;
    }
    step.plain = !step.momentum && !step.pull && step.decay == 0.f && step.proximal == 0.f;
    return step;
  }

  void put(int at, int32_t id) {
    data_.load(id, network_.features());
    network_.set_input(at, network_.features());
    y_[static_cast<size_t>(at)] = data_.label(id);
    stored_[static_cast<size_t>(at)] = nullptr;
  }

  // Appends stored samples to the batch; returns how many.
  int replay(int64_t k, int arriving) {
    if (!args_.replay_ids) return 0;
    const int64_t from = args_.replay_starts[k];
    const int64_t held = args_.replay_starts[k + 1] - from;
    if (held == 0) return 0;
    const int64_t wanted = args_.replay_batch > 0 ? args_.replay_batch : arriving;
    const int count = static_cast<int>(std::min(wanted, held));
    const uint32_t* picks =
        picks_.first(draws_.next(), static_cast<size_t>(held), static_cast<size_t>(count));
    for (int i = 0; i < count; i++) {
      put(arriving + i, args_.replay_ids[from + picks[i]]);
      if (args_.logits) {
        stored_[static_cast<size_t>(arriving + i)] =
            args_.logits + static_cast<size_t>(from + picks[i]) * plan_.num_classes();
      }
    }
    return count;
  }

  void weigh(int arriving, int replayed) {
    float first = 1.f / static_cast<float>(arriving + replayed), second = first;
    if (replayed > 0 && args_.replay_share >= 0.0) {
      first = static_cast<float>(1.0 - args_.replay_share) / static_cast<float>(arriving);
      second = static_cast<float>(args_.replay_share) / static_cast<float>(replayed);
    }
    std::fill_n(weight_.begin(), arriving, first);
    std::fill_n(weight_.begin() + arriving, replayed, second);
  }

  const Plan& plan_;
  const Data& data_;
  const FitArguments& args_;
  const float* initial_;
  Network network_;
  float *theta_ = nullptr, *momentum_ = nullptr, *pull_ = nullptr, *anchor_ = nullptr;
  float* charge_ = nullptr;
  std::vector<int64_t> y_;
  std::vector<float> weight_;
  std::vector<const float*> stored_;
  Permuter shuffles_, picks_;
  TorchDraws draws_{0};
};

// The largest batch that any device will see, replay included.
int largest_batch(const FitArguments& args) {
  int64_t largest = 1;
  for (int64_t k = 0; k < args.num_devices; k++) {
    const int64_t arriving = std::min(args.batch_size, args.starts[k + 1] - args.starts[k]);
    int64_t replayed = 0;
    if (args.replay_ids) {
      replayed = std::min(args.replay_batch > 0 ? args.replay_batch : arriving,
                          args.replay_starts[k + 1] - args.replay_starts[k]);
    }
    largest = std::max(largest, arriving + replayed);
  }
  return static_cast<int>(largest);
}

// A packed copy of flat parameters.
class Packed {
 public:
  Packed(const Plan& plan, const float* flat) {
    arena_.reset(plan.packed_size() * sizeof(float));
    std::memset(data(), 0, plan.packed_size() * sizeof(float));
    plan.pack(flat, plan.num_params(), data());
  }
  float* data() { return reinterpret_cast<float*>(arena_.data()); }

 private:
  Arena arena_;
};

}  // namespace

void fit(const Plan& plan, const Data& data, const FitArguments& args) {
  Packed initial(plan, args.params);
  const int max_batch = largest_batch(args);
  run_jobs(
      longest_first(args.starts, args.num_devices), args.num_threads,
      [&] { return std::make_unique<Trainer>(plan, data, args, initial.data(), max_batch); },
      [](auto& trainer, int64_t k) { trainer->train(k); });
}

void forward(const Plan& plan, const Data& data, const float* params, const int32_t* ids, int64_t n,
             int64_t batch_size, int num_threads, float* logits) {
  Packed theta(plan, params);
  const int64_t batch = std::min(batch_size, std::max<int64_t>(n, 1));
  const size_t classes = static_cast<size_t>(plan.num_classes());
  run_jobs(
      in_order((n + batch - 1) / batch), num_threads,
      [&] {
        return std::make_unique<Network>(plan, static_cast<int>(batch), false, thread_arena(0));
      },
      [&](auto& network, int64_t job) {
        const int64_t begin = job * batch;
        const int count = static_cast<int>(std::min(batch, n - begin));
        for (int i = 0; i < count; i++) {
          data.load(ids[begin + i], network->features());
          network->set_input(i, network->features());
        }
        network->forward(count, theta.data());
        for (int i = 0; i < count; i++) {
          std::memcpy(logits + static_cast<size_t>(begin + i) * classes,
                      network->logits() + static_cast<size_t>(i) * network->logits_stride(),
                      classes * sizeof(float));
        }
      });
}

void fisher(const Plan& plan, const Data& data, const float* params, int64_t num_devices,
            const int32_t* ids, const int64_t* starts, int64_t max_samples, size_t size,
            int num_threads, float* out) {
  constexpr int kChunk = 32;
  struct State {
    State(const Plan& plan)
        : network(plan, kChunk, true, thread_arena(0)), y(kChunk), weight(kChunk, 1.f) {
      thread_arena(1).reset(plan.packed_size() * sizeof(float));
      sum = reinterpret_cast<float*>(thread_arena(1).data());
    }
    Network network;
    std::vector<int64_t> y;
    std::vector<float> weight;
    float* sum;
  };
  Packed theta(plan, params);
  run_jobs(
      longest_first(starts, num_devices), num_threads,
      [&] { return std::make_unique<State>(plan); },
      [&](auto& state, int64_t k) {
        Network& network = state->network;
        int64_t n = starts[k + 1] - starts[k];
        if (max_samples > 0) n = std::min(n, max_samples);
        std::memset(state->sum, 0, plan.packed_size() * sizeof(float));
        for (int64_t begin = 0; begin < n; begin += kChunk) {
          const int count = static_cast<int>(std::min<int64_t>(kChunk, n - begin));
          for (int i = 0; i < count; i++) {
            const int32_t id = ids[starts[k] + begin + i];
            data.load(id, network.features());
            network.set_input(i, network.features());
            state->y[static_cast<size_t>(i)] = data.label(id);
          }
          network.forward(count, theta.data());
          network.loss(count, {state->y.data(), state->weight.data(), 1.f, data.task_masks});
          network.add_squared_gradients(count, theta.data(), state->sum);
        }
        float* row = out + static_cast<size_t>(k) * size;
        plan.unpack(state->sum, nullptr, n > 0 ? 1.f / static_cast<float>(n) : 0.f, size, true,
                    row);
        plan.zero_rest(row, size);
      });
}

}  // namespace edgelearn
