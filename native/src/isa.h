// Which kernels run here.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace edgelearn {

struct Isa {
  std::string name;
  const Kernels* kernels;
};

// Instruction sets that this processor supports, the best last.
std::vector<Isa> supported_isas();

// The named one; if the name is empty, what EDGELEARN_NATIVE_ISA says, else the best.
// Throws std::invalid_argument if it is unknown or unsupported.
Isa choose_isa(const std::string& name);

}  // namespace edgelearn
