#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace edgelearn {

namespace portable {
extern const Kernels kernels;
}
#ifdef EDGELEARN_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas = {{"portable", &portable::kernels}};
#ifdef EDGELEARN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back({"avx2", &avx2::kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      isas.push_back({"avx512", &avx512::kernels});
    }
  }
#endif
  return isas;
}

Isa choose_isa(const std::string& name) {
  const std::vector<Isa> isas = supported_isas();
  const char* forced = std::getenv("EDGELEARN_NATIVE_ISA");
  const std::string wanted = !name.empty() ? name : forced ? forced : "";
  if (wanted.empty()) return isas.back();
  std::string allowed;
  for (const Isa& isa : isas) {
    if (isa.name == wanted) return isa;
    allowed += (allowed.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + wanted + "'" +
                              (name.empty() ? " (from EDGELEARN_NATIVE_ISA)" : "") +
                              " is not available; this processor and build offer " + allowed);
}

}  // namespace edgelearn
