// The Python module: checks of arguments, and nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data.h"
#include "fit.h"
#include "isa.h"
#include "permutation.h"
#include "plan.h"
#include "reduce.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgelearn {

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
using Shape = std::vector<int64_t>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); i++) {
    out += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return out + "]";
}

template <typename A>
Shape shape_of(const A& array) {
  Shape shape;
  for (size_t i = 0; i < array.ndim(); i++) shape.push_back(static_cast<int64_t>(array.shape(i)));
  return shape;
}

template <typename T>
const char* dtype_name();
template <>
const char* dtype_name<float>() {
  return "float32";
}
template <>
const char* dtype_name<double>() {
  return "float64";
}
template <>
const char* dtype_name<int32_t>() {
  return "int32";
}
template <>
const char* dtype_name<int64_t>() {
  return "int64";
}
template <>
const char* dtype_name<uint64_t>() {
  return "uint64";
}
template <>
const char* dtype_name<uint8_t>() {
  return "uint8";
}
template <>
const char* dtype_name<bool>() {
  return "bool";
}

// The elements of an array of this type and shape, contiguous; a size of -1 allows any.
template <typename T, typename A>
auto* elements(const std::string& name, const A& array, const Shape& shape) {
  const Shape actual = shape_of(array);
  bool same = actual.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); i++) same = shape[i] < 0 || shape[i] == actual[i];
  if (!same) refuse(name + " has shape " + text(actual) + ", expected " + text(shape));
  if (array.dtype() != nb::dtype<T>()) refuse(name + " must be " + dtype_name<T>());
  int64_t stride = 1;
  for (size_t i = actual.size(); i-- > 0;) {
    if (array.size() > 0 && actual[i] > 1 && array.stride(i) != stride)
      refuse(name + " must be C-contiguous");
    stride *= actual[i];
  }
  if constexpr (std::is_same_v<A, Output>) {
    return static_cast<T*>(array.data());
  } else {
    return static_cast<const T*>(array.data());
  }
}

void check_at_least(const char* name, double value, double least) {
  if (!(value >= least) || std::isinf(value)) {
    refuse(std::string(name) + " is " + std::to_string(value) + "; at least " +
           std::to_string(least) + " and finite is allowed");
  }
}

void check_starts(const std::string& name, const int64_t* starts, int64_t rows, int64_t size) {
  bool good = starts[0] >= 0 && starts[rows] <= size;
  for (int64_t k = 0; k < rows; k++) good = good && starts[k] <= starts[k + 1];
  if (!good) {
    refuse(name + " must not decrease and must lie between 0 and " + std::to_string(size));
  }
}

void check_ids(const std::string& name, const int32_t* ids, int64_t size, int64_t num_ids) {
  for (int64_t i = 0; i < size; i++) {
    if (ids[i] < 0 || ids[i] >= num_ids) {
      refuse(name + " has the id " + std::to_string(ids[i]) + "; allowed: 0 to " +
             std::to_string(num_ids - 1));
    }
  }
}

int checked_threads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > 1024) {
    refuse("num_threads is " + std::to_string(num_threads) + "; allowed: 1 to 1024");
  }
  return static_cast<int>(num_threads);
}

// A data set with the arrays that it refers to.
class DataHandle {
 public:
  DataHandle(Array x, Array y, double scale, double shift, std::optional<Array> domain_index,
             std::optional<Array> domain_weight, std::optional<Array> task_masks)
      : kept_{x, y} {
    if (x.ndim() < 2) refuse("x has shape " + text(shape_of(x)) + ", expected [N, ...]");
    data.bytes = x.dtype() == nb::dtype<uint8_t>();
    const Shape shape = shape_of(x);
    if (data.bytes) {
      data.x = elements<uint8_t>("x", x, shape);
    } else if (x.dtype() == nb::dtype<float>()) {
      data.x = elements<float>("x", x, shape);
    } else {
      refuse("x must be uint8 or float32");
    }
    data.size = shape[0];
    data.features = 1;
    for (size_t i = 1; i < shape.size(); i++) data.features *= static_cast<size_t>(shape[i]);
    data.y = elements<int64_t>("y", y, {data.size});
    if (data.size > 0) {
      const auto [low, high] = std::minmax_element(data.y, data.y + data.size);
      data.lowest_label = *low;
      data.highest_label = *high;
    }
    data.scale = static_cast<float>(scale);
    data.shift = static_cast<float>(shift);
    if (domain_index) {
      const int64_t features = static_cast<int64_t>(data.features);
      data.domain_index = elements<int64_t>("domain_index", *domain_index, {-1, -1, features});
      data.domains = static_cast<int64_t>(domain_index->shape(0));
      data.taps = static_cast<int64_t>(domain_index->shape(1));
      if (data.taps < 1 || data.domains < 1) refuse("domain_index is empty");
      if (data.taps > 1 && !domain_weight) refuse("several taps need domain_weight");
      const int64_t size = data.domains * data.taps * features;
      for (int64_t i = 0; i < size; i++) {
        if (data.domain_index[i] < 0 || data.domain_index[i] >= features) {
          refuse("domain_index has " + std::to_string(data.domain_index[i]) + "; allowed: 0 to " +
                 std::to_string(features - 1));
        }
      }
      kept_.push_back(*domain_index);
    }
    if (domain_weight) {
      if (!domain_index) refuse("domain_weight needs domain_index");
      data.domain_weight =
          elements<float>("domain_weight", *domain_weight, shape_of(*domain_index));
      kept_.push_back(*domain_weight);
    }
    if (task_masks) {
      if (task_masks->ndim() != 2) refuse("task_masks must be [C, C]");
      data.mask_classes = static_cast<int64_t>(task_masks->shape(0));
      data.task_masks = reinterpret_cast<const uint8_t*>(
          elements<bool>("task_masks", *task_masks, {data.mask_classes, data.mask_classes}));
      kept_.push_back(*task_masks);
    }
    if (data.num_ids() > INT32_MAX) refuse("ids of this data set don't fit int32");
  }

  void check_fits(const Plan& plan) const {
    if (data.features != plan.num_features()) {
      refuse("samples have " + std::to_string(data.features) + " features, the plan expects " +
             std::to_string(plan.num_features()));
    }
  }

  void check_labels(const Plan& plan) const {
    if (data.lowest_label < 0 || data.highest_label >= plan.num_classes()) {
      refuse("labels are " + std::to_string(data.lowest_label) + " to " +
             std::to_string(data.highest_label) + "; allowed: 0 to " +
             std::to_string(plan.num_classes() - 1));
    }
    if (data.task_masks && data.mask_classes != plan.num_classes()) {
      refuse("task_masks are for " + std::to_string(data.mask_classes) + " classes, the plan has " +
             std::to_string(plan.num_classes()));
    }
  }

  Data data;

 private:
  std::vector<Array> kept_;
};

std::vector<LayerSpec> layer_specs(const nb::iterable& layers) {
  std::vector<LayerSpec> specs;
  for (nb::handle item : layers) {
    nb::tuple layer;
    LayerSpec spec;
    if (!nb::try_cast(item, layer) || layer.size() == 0 || !nb::try_cast(layer[0], spec.kind)) {
      refuse("layer " + std::to_string(specs.size()) + " is not a tuple that begins with a name");
    }
    for (size_t i = 1; i < layer.size(); i++) {
      int64_t value;
      if (!nb::try_cast(layer[i], value)) {
        refuse("layer " + std::to_string(specs.size()) + " (" + spec.kind + "): argument " +
               std::to_string(i) + " is not an integer");
      }
      spec.args.push_back(value);
    }
    specs.push_back(std::move(spec));
  }
  return specs;
}

nb::tuple fit_devices(const Plan& plan, const DataHandle& handle, const Array& params,
                      const Output& updates, const Array& ids, const Array& starts,
                      const Array& seeds, const std::optional<Array>& draw_seeds, int64_t epochs,
                      int64_t batch_size, double lr, double momentum, double weight_decay,
                      double proximal_mu, const std::optional<Array>& curvature,
                      const std::optional<Array>& anchor, int64_t curvature_size, double strength,
                      const std::optional<Output>& charge,
                      const std::optional<Array>& replay_ids,
                      const std::optional<Array>& replay_starts, int64_t replay_batch,
                      double replay_share, const std::optional<Array>& logits,
                      double distill_weight, int64_t num_threads) {
  const int64_t size = static_cast<int64_t>(plan.num_params());
  handle.check_fits(plan);
  handle.check_labels(plan);
  FitArguments a{};
  a.params = elements<float>("params", params, {size});
  a.updates = elements<float>("updates", updates, {-1, size});
  const int64_t devices = a.num_devices = static_cast<int64_t>(updates.shape(0));
  a.ids = elements<int32_t>("ids", ids, {-1});
  a.starts = elements<int64_t>("starts", starts, {devices + 1});
  check_starts("starts", a.starts, devices, static_cast<int64_t>(ids.size()));
  check_ids("ids", a.ids, static_cast<int64_t>(ids.size()), handle.data.num_ids());
  a.seeds = elements<uint64_t>("seeds", seeds, {devices});
  if (draw_seeds) a.draw_seeds = elements<uint64_t>("draw_seeds", *draw_seeds, {devices});
  if (epochs < 0) refuse("epochs is " + std::to_string(epochs) + "; at least 0");
  if (batch_size < 1 || batch_size > (1 << 24)) {
    refuse("batch_size is " + std::to_string(batch_size) + "; allowed: 1 to 16777216");
  }
  check_at_least("lr", lr, 0.0);
  check_at_least("momentum", momentum, 0.0);
  check_at_least("weight_decay", weight_decay, 0.0);
  check_at_least("proximal_mu", proximal_mu, 0.0);
  check_at_least("strength", strength, 0.0);
  check_at_least("distill_weight", distill_weight, 0.0);
  a.epochs = epochs;
  a.batch_size = batch_size;
  a.lr = static_cast<float>(lr);
  a.momentum = static_cast<float>(momentum);
  a.weight_decay = static_cast<float>(weight_decay);
  a.proximal_mu = static_cast<float>(proximal_mu);
  a.strength = static_cast<float>(strength);
  if (curvature.has_value() != anchor.has_value())
    refuse("give both curvature and anchor, or none");
  if (curvature) {
    a.curvature = elements<uint64_t>("curvature", *curvature, {devices});
    a.anchor = elements<uint64_t>("anchor", *anchor, {devices});
    if (curvature_size < 0 || curvature_size > size) {
      refuse("curvature_size is " + std::to_string(curvature_size) + "; allowed: 0 to " +
             std::to_string(size));
    }
    a.pull_size = static_cast<size_t>(curvature_size);
  }
  if (charge) {
    a.charge = elements<float>("charge", *charge, {devices, -1});
    if (charge->shape(1) > plan.num_params()) {
      refuse("charge has more columns than there are parameters");
    }
    a.charge_size = charge->shape(1);
  }
  if (replay_ids.has_value() != replay_starts.has_value()) {
    refuse("give both replay_ids and replay_starts, or none");
  }
  if (replay_ids) {
    if (!draw_seeds) refuse("replay needs draw_seeds");
    a.replay_ids = elements<int32_t>("replay_ids", *replay_ids, {-1});
    const int64_t held = static_cast<int64_t>(replay_ids->size());
    a.replay_starts = elements<int64_t>("replay_starts", *replay_starts, {devices + 1});
    check_starts("replay_starts", a.replay_starts, devices, held);
    check_ids("replay_ids", a.replay_ids, held, handle.data.num_ids());
    if (replay_batch < 0)
      refuse("replay_batch is " + std::to_string(replay_batch) + "; at least 0");
    if (!(replay_share <= 1.0)) refuse("replay_share is above 1 or no number");
    a.replay_batch = replay_batch;
    a.replay_share = replay_share;
    if (logits) a.logits = elements<float>("logits", *logits, {held, plan.num_classes()});
    a.distill_weight = distill_weight;
  } else if (logits) {
    refuse("logits need replay_ids");
  }
  a.num_threads = checked_threads(num_threads);

  const size_t count = static_cast<size_t>(devices);
  auto results = [&]<typename T>(T) {
    T* values = new T[count]();
    nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return std::pair(values, nb::ndarray<nb::numpy, T>(values, {count}, owner));
  };
  auto [loss, loss_array] = results(double{});
  auto [steps, steps_array] = results(int64_t{});
  auto [passed, passed_array] = results(int64_t{});
  a.loss = loss;
  a.steps = steps;
  a.passed = passed;
  {
    nb::gil_scoped_release release;
    fit(plan, handle.data, a);
  }
  return nb::make_tuple(loss_array, steps_array, passed_array);
}

void forward_samples(const Plan& plan, const DataHandle& handle, const Array& params,
                     const Array& ids, const Output& out_logits, int64_t num_threads,
                     int64_t batch_size) {
  handle.check_fits(plan);
  const float* theta = elements<float>("params", params, {static_cast<int64_t>(plan.num_params())});
  const int32_t* samples = elements<int32_t>("ids", ids, {-1});
  const int64_t n = static_cast<int64_t>(ids.size());
  check_ids("ids", samples, n, handle.data.num_ids());
  float* out = elements<float>("out_logits", out_logits, {n, plan.num_classes()});
  if (batch_size < 1 || batch_size > 65536) {
    refuse("batch_size is " + std::to_string(batch_size) + "; allowed: 1 to 65536");
  }
  const int threads = checked_threads(num_threads);
  nb::gil_scoped_release release;
  forward(plan, handle.data, theta, samples, n, batch_size, threads, out);
}

void fisher_of_devices(const Plan& plan, const DataHandle& handle, const Array& params,
                       const Array& ids, const Array& starts, const Output& out,
                       int64_t max_samples, int64_t num_threads) {
  handle.check_fits(plan);
  handle.check_labels(plan);
  const float* theta = elements<float>("params", params, {static_cast<int64_t>(plan.num_params())});
  const int32_t* samples = elements<int32_t>("ids", ids, {-1});
  float* rows = elements<float>("out", out, {-1, -1});
  const int64_t devices = static_cast<int64_t>(out.shape(0));
  if (out.shape(1) > plan.num_params()) refuse("out has more columns than there are parameters");
  const int64_t* begins = elements<int64_t>("starts", starts, {devices + 1});
  check_starts("starts", begins, devices, static_cast<int64_t>(ids.size()));
  check_ids("ids", samples, static_cast<int64_t>(ids.size()), handle.data.num_ids());
  if (max_samples < 0) refuse("max_samples is " + std::to_string(max_samples) + "; at least 0");
  const int threads = checked_threads(num_threads);
  nb::gil_scoped_release release;
  fisher(plan, handle.data, theta, devices, samples, begins, max_samples, out.shape(1), threads,
         rows);
}

void sum_rows(const Array& updates, const Array& weights, const Output& out, int64_t num_threads) {
  const float* rows = elements<float>("updates", updates, {-1, -1});
  const int64_t count = static_cast<int64_t>(updates.shape(0));
  std::vector<double> weight(static_cast<size_t>(count));
  if (weights.dtype() == nb::dtype<float>()) {
    const float* values = elements<float>("weights", weights, {count});
    std::copy(values, values + count, weight.begin());
  } else {
    const double* values = elements<double>("weights", weights, {count});
    std::copy(values, values + count, weight.begin());
  }
  float* total = elements<float>("out", out, {static_cast<int64_t>(updates.shape(1))});
  const Isa isa = choose_isa("");
  const int threads = checked_threads(num_threads);
  nb::gil_scoped_release release;
  weighted_sum(*isa.kernels, rows, weight.data(), count, updates.shape(1), total, threads);
}

void check_rows(const Array& updates, const Output& finite, const Output& norms,
                int64_t num_threads) {
  const float* rows = elements<float>("updates", updates, {-1, -1});
  const int64_t count = static_cast<int64_t>(updates.shape(0));
  bool* flags = elements<bool>("finite", finite, {count});
  double* lengths = elements<double>("norms", norms, {count});
  const Isa isa = choose_isa("");
  const int threads = checked_threads(num_threads);
  nb::gil_scoped_release release;
  finite_rows(*isa.kernels, rows, count, updates.shape(1), flags, lengths, threads);
}

auto permutation(uint64_t seed, int64_t n) {
  if (n < 0 || n > UINT32_MAX) refuse("n is " + std::to_string(n) + "; allowed: 0 to 4294967295");
  const size_t count = static_cast<size_t>(n);
  Permuter permuter;
  const uint32_t* order = permuter.all(seed, count);
  int64_t* values = new int64_t[count];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  std::copy(order, order + count, values);
  return nb::ndarray<nb::numpy, int64_t>(values, {count}, owner);
}

}  // namespace

}  // namespace edgelearn

NB_MODULE(_core, m) {
  using namespace edgelearn;

  nb::class_<DataHandle>(m, "Data")
      .def(nb::init<Array, Array, double, double, std::optional<Array>, std::optional<Array>,
                    std::optional<Array>>(),
           nb::arg("x").noconvert(), nb::arg("y").noconvert(), "scale"_a = 1.0, "shift"_a = 0.0,
           nb::arg("domain_index").noconvert() = nb::none(),
           nb::arg("domain_weight").noconvert() = nb::none(),
           nb::arg("task_masks").noconvert() = nb::none())
      .def("__len__", [](const DataHandle& d) { return d.data.size; });

  nb::class_<Plan>(m, "Plan")
      .def(
          "__init__",
          [](Plan* self, const std::vector<int64_t>& input_shape, int64_t num_params,
             const nb::iterable& layers, const std::optional<std::string>& isa) {
            new (self) Plan(input_shape, num_params, layer_specs(layers), isa.value_or(""));
          },
          "input_shape"_a, "num_params"_a, "layers"_a, "isa"_a = nb::none())
      .def_prop_ro("isa", &Plan::isa)
      .def_prop_ro("num_params", [](const Plan& p) { return p.num_params(); })
      .def_prop_ro("num_classes", &Plan::num_classes)
      .def("fit", fit_devices, "data"_a, nb::arg("params").noconvert(),
           nb::arg("updates").noconvert(), nb::kw_only(), nb::arg("ids").noconvert(),
           nb::arg("starts").noconvert(), nb::arg("seeds").noconvert(),
           nb::arg("draw_seeds").noconvert() = nb::none(), "epochs"_a, "batch_size"_a, "lr"_a,
           "momentum"_a = 0.0, "weight_decay"_a = 0.0, "proximal_mu"_a = 0.0,
           nb::arg("curvature").noconvert() = nb::none(),
           nb::arg("anchor").noconvert() = nb::none(), "curvature_size"_a = 0, "strength"_a = 0.0,
           nb::arg("charge").noconvert() = nb::none(),
           nb::arg("replay_ids").noconvert() = nb::none(),
           nb::arg("replay_starts").noconvert() = nb::none(), "replay_batch"_a = 0,
           "replay_share"_a = -1.0, nb::arg("logits").noconvert() = nb::none(),
           "distill_weight"_a = 0.0, "num_threads"_a = 1)
      .def("forward", forward_samples, "data"_a, nb::arg("params").noconvert(),
           nb::arg("ids").noconvert(), nb::arg("out_logits").noconvert(), "num_threads"_a = 1,
           "batch_size"_a = 64)
      .def("fisher", fisher_of_devices, "data"_a, nb::arg("params").noconvert(),
           nb::arg("ids").noconvert(), nb::arg("starts").noconvert(), nb::arg("out").noconvert(),
           "max_samples"_a = 0, "num_threads"_a = 1);

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : supported_isas()) names.push_back(isa.name);
    return names;
  });
  m.def("mix", &mix, "x"_a);
  m.def("permutation", permutation, "seed"_a, "n"_a);
  m.def("weighted_sum", sum_rows, nb::arg("updates").noconvert(), nb::arg("weights").noconvert(),
        nb::arg("out").noconvert(), "num_threads"_a = 1);
  m.def("finite_rows", check_rows, nb::arg("updates").noconvert(), nb::arg("finite").noconvert(),
        nb::arg("norms").noconvert(), "num_threads"_a = 1);
}
