// A queue of numbered jobs, worked off by several threads with a state each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "pool.h"

namespace edgelearn {

// Runs `job(state, i)` for i in `order`, taken one by one from the front by whoever is free.
// `make_state()` is called once in each thread that gets work.
template <typename MakeState, typename Job>
void run_jobs(const std::vector<int64_t>& order, int num_threads, MakeState&& make_state,
              Job&& job) {
  const int64_t count = static_cast<int64_t>(order.size());
  std::atomic<int64_t> next{0};
  Pool::shared().run(static_cast<int>(std::min<int64_t>(num_threads, count)), [&] {
    int64_t i = next.fetch_add(1);
    if (i >= count) return;
    auto state = make_state();
    for (; i < count; i = next.fetch_add(1)) job(state, order[static_cast<size_t>(i)]);
  });
}

// Jobs in an order that keeps all threads busy: the longest first.
inline std::vector<int64_t> longest_first(const int64_t* starts, int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto length = [&](int64_t k) { return starts[k + 1] - starts[k]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  return order;
}

inline std::vector<int64_t> in_order(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  return order;
}

}  // namespace edgelearn
