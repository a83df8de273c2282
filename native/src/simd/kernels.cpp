// Compiled once per instruction set: CMakeLists.txt names the set, its vector width and its flags.
#include "simd/conv.h"
#include "simd/linear.h"
#include "simd/loss.h"
#include "simd/step.h"

namespace edgelearn::EDGELEARN_ISA {

extern const Kernels kernels;

const Kernels kernels = {
    W,
    linear_forward,
    linear_backward,
    step_range,
    pull_weights,
    conv_pack,
    conv_packed_floats,
    conv_partial_floats,
    conv_forward,
    conv_backward,
    cross_entropy,
    rectify_gradient,
    square,
    add_square,
    transpose,
    axpy,
    squared_norm,
};

}  // namespace edgelearn::EDGELEARN_ISA
