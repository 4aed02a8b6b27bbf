// Decides which instruction set the CPU kernels use, as PyTorch decides for its own.
#include "common/isa.h"

#include <ATen/Version.h>

#include <string>

namespace dgm {
namespace {

Isa detect() {
#ifdef DGM_HAVE_X86_ISAS
  const std::string allowed = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
  const bool allows_avx512 = allowed.rfind("AVX512", 0) == 0;
  const bool allows_avx2 = allows_avx512 || allowed == "AVX2";
  // PyTorch's answer covers its own flags; ours are checked one by one.
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allows_avx512 && has_avx512) return Isa::Avx512;
  if (allows_avx2 && has_avx2) return Isa::Avx2;
#endif
  return Isa::Default;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

bool has_bf16_products() {
#ifdef DGM_HAVE_X86_ISAS
  static const bool has = active_isa() == Isa::Avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Avx512:
      return "avx512";
    case Isa::Avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace dgm
