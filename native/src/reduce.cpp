#include "reduce.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "workers.h"

namespace edgelearn {

void weighted_sum(const Kernels& kernels, const float* updates, const double* weight, int64_t rows,
                  size_t cols, float* out, int num_threads) {
  constexpr size_t kRange = 8192;  // the sums stay in the first-level cache
  run_jobs(
      in_order(static_cast<int64_t>((cols + kRange - 1) / kRange)), num_threads, [] { return 0; },
      [&](int, int64_t job) {
        const size_t begin = static_cast<size_t>(job) * kRange;
        const size_t size = std::min(kRange, cols - begin);
        std::memset(out + begin, 0, size * sizeof(float));
        for (int64_t k = 0; k < rows; k++) {
          if (weight[k] == 0.0) continue;
          kernels.axpy(updates + static_cast<size_t>(k) * cols + begin,
                       static_cast<float>(weight[k]), out + begin, size);
        }
      });
}

void finite_rows(const Kernels& kernels, const float* updates, int64_t rows, size_t cols,
                 bool* finite, double* norm, int num_threads) {
  run_jobs(
      in_order(rows), num_threads, [] { return 0; },
      [&](int, int64_t k) {
        norm[k] = std::sqrt(
            kernels.squared_norm(updates + static_cast<size_t>(k) * cols, cols, finite + k));
      });
}

}  // namespace edgelearn
