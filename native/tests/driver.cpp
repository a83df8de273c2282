// Drives the kernels through many shapes and options, for the sanitizers; checks only what must
// hold without a reference: finite results, and the same bits for any number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "fit.h"
#include "reduce.h"

using namespace edgelearn;

namespace {

struct Net {
  const char* name;
  std::vector<int64_t> shape;
  int64_t size;
  std::vector<LayerSpec> layers;
};

void require(bool condition, const char* what, const char* net) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what, net);
  std::exit(1);
}

std::vector<Net> nets() {
  std::vector<Net> all;
  all.push_back({"tiny",
                 {64},
                 2410,
                 {{"linear", {0, 2048, 32}}, {"relu", {}}, {"linear", {2080, 2400, 10}}}});
  all.push_back({"odd",
                 {13},
                 300,
                 {{"linear", {1, -1, 17}},
                  {"relu", {}},
                  {"linear", {230, 247, 1}},
                  {"linear", {250, 260, 7}}}});
  all.push_back({"wide",
                 {1500},
                 1500 * 35 + 35 + 35 * 5,
                 {{"linear", {0, 52500, 35}}, {"linear", {52535, -1, 5}}}});
  // conv 5x5 3 -> 6 pad 2, pool; conv 3x3 6 -> 19 pad 0; conv 1x1 19 -> 33; linear
  const int64_t a = 3 * 25 * 6, b = a + 6, c = b + 6 * 9 * 19, d = c + 19 * 33, e = d + 33,
                f = e + 33 * 12 * 4;
  all.push_back({"convs",
                 {3, 9, 13},
                 f + 4,
                 {{"conv2d", {0, a, 6, 5, 5, 2, 2}},
                  {"relu", {}},
                  {"maxpool2d", {2}},
                  {"conv2d", {b, -1, 19, 3, 3, 1, 0}},
                  {"conv2d", {c, d, 33, 1, 1, 0, 0}},
                  {"maxpool2d", {2}},
                  {"relu", {}},
                  {"flatten", {}},
                  {"linear", {e, f, 4}}}});
  return all;
}

void drive(const Net& net, const std::string& isa, int64_t batch_size, bool all_options) {
  // 33 * 2 * 2 features reach the last layer of "convs"; the offsets above leave room for more.
  const Plan plan(net.shape, net.size, net.layers, isa);
  const size_t features = plan.num_features();
  const int64_t n = 37, devices = 6, classes = plan.num_classes();
  std::vector<uint8_t> x(n * features), masks(classes * classes, 1);
  std::vector<int64_t> y(n), index(2 * 3 * features);
  std::vector<float> weight(2 * 3 * features, 1.f / 3);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  for (int64_t i = 0; i < n; i++) y[i] = i * 7 % classes;
  for (size_t i = 0; i < index.size(); i++) index[i] = static_cast<int64_t>(i * 31 % features);
  Data data;
  data.x = x.data();
  data.bytes = true;
  data.size = n;
  data.features = features;
  data.scale = 1 / 128.f;
  data.shift = 1.f;
  data.y = y.data();
  data.highest_label = classes - 1;
  if (all_options) {
    data.domain_index = index.data();
    data.domain_weight = weight.data();
    data.domains = 2;
    data.taps = 3;
    data.task_masks = masks.data();
    data.mask_classes = classes;
  }
  std::vector<float> params(net.size);
  for (size_t i = 0; i < params.size(); i++) params[i] = 0.05f * std::sin(static_cast<float>(i));
  std::vector<int32_t> ids;
  std::vector<int64_t> starts = {0}, replay_starts = {0};
  std::vector<uint64_t> seeds, curvature, anchor;
  std::vector<float> fisher_of_devices(devices * net.size);
  for (int64_t k = 0; k < devices; k++) {
    for (int64_t i = 0; i < k * 5; i++)
      ids.push_back(static_cast<int32_t>((i * 11 + k) % data.num_ids()));
    starts.push_back(static_cast<int64_t>(ids.size()));
    replay_starts.push_back(starts.back() / 2);
    seeds.push_back(static_cast<uint64_t>(k) * 12345);
  }
  fisher(plan, data, params.data(), devices, ids.data(), starts.data(), 0, net.size, 3,
         fisher_of_devices.data());
  std::vector<float> logits(ids.size() * classes);
  forward(plan, data, params.data(), ids.data(), static_cast<int64_t>(ids.size()), 7, 3,
          logits.data());
  for (int64_t k = 0; k < devices; k++) {
    curvature.push_back(reinterpret_cast<uint64_t>(fisher_of_devices.data() + k * net.size));
    anchor.push_back(reinterpret_cast<uint64_t>(params.data()));
  }
  std::vector<float> first;
  for (int threads : {1, 2, 4}) {
    std::vector<float> updates(devices * net.size, NAN), charge(devices * (net.size - 1), 0.f);
    std::vector<double> loss(devices);
    std::vector<int64_t> steps(devices), passed(devices);
    FitArguments args{};
    args.params = params.data();
    args.updates = updates.data();
    args.num_devices = devices;
    args.ids = ids.data();
    args.starts = starts.data();
    args.seeds = args.draw_seeds = seeds.data();
    args.epochs = 2;
    args.batch_size = batch_size;
    args.lr = 0.05f;
    if (all_options) {
      args.momentum = 0.5f;
      args.weight_decay = 0.01f;
      args.proximal_mu = 0.1f;
      args.curvature = curvature.data();
      args.anchor = anchor.data();
      args.pull_size = net.size - 3;
      args.strength = 2.f;
      args.charge = charge.data();
      args.charge_size = net.size - 1;
      args.replay_ids = ids.data();
      args.replay_starts = replay_starts.data();
      args.replay_share = 0.5;
      args.logits = logits.data();
      args.distill_weight = 0.1;
    }
    args.num_threads = threads;
    args.loss = loss.data();
    args.steps = steps.data();
    args.passed = passed.data();
    fit(plan, data, args);
    for (float c : charge) require(std::isfinite(c), "a charge is not finite", net.name);
    for (float u : updates) require(std::isfinite(u), "an update is not finite", net.name);
    if (first.empty()) first = updates;
    require(std::memcmp(first.data(), updates.data(), first.size() * sizeof(float)) == 0,
            "threads change the result", net.name);
    std::vector<float> total(net.size);
    std::vector<double> weights(devices, 0.5), norms(devices);
    bool finite[6];
    weighted_sum(plan.kernels(), updates.data(), weights.data(), devices, net.size, total.data(),
                 threads);
    finite_rows(plan.kernels(), updates.data(), devices, net.size, finite, norms.data(), threads);
    require(finite[0] && finite[5] && norms[5] > 0, "norms", net.name);
  }
}

}  // namespace

int main() {
  const auto everything = [] {
    for (const Isa& isa : supported_isas()) {
      for (const Net& net : nets()) {
        for (int64_t batch_size : {1, 4, 7, 25}) {
          drive(net, isa.name, batch_size, false);
          drive(net, isa.name, batch_size, true);
        }
      }
    }
  };
  std::thread other(everything);  // two callers share the pool
  everything();
  other.join();
  std::puts("ok");
}
