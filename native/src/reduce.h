// Reductions over devices' updates.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace edgelearn {

// out = sum over k of weight[k] * updates[k], added in the order of rows; rows of weight 0 are not
// read, whatever they hold. [K, P] and [P].
void weighted_sum(const Kernels& kernels, const float* updates, const double* weight, int64_t rows,
                  size_t cols, float* out, int num_threads);

// Whether each row is finite, and its L2 norm.
void finite_rows(const Kernels& kernels, const float* updates, int64_t rows, size_t cols,
                 bool* finite, double* norm, int num_threads);

}  // namespace edgelearn
