// Picks, at run time, one of the builds of a CPU kernel: default, AVX2 or AVX-512. No torch header in here.
#pragma once

namespace dgm {

enum class Isa { Default, Avx2, Avx512 };

// The widest instruction set that both this CPU and PyTorch (ATEN_CPU_CAPABILITY) allow; fixed at the first call.
Isa active_isa();

const char* isa_name(Isa isa);

// Whether, with AVX-512, the CPU multiplies pairs of bfloat16; a kernel may have a fourth build for that.
bool has_bf16_products();

template <class Function>
Function pick_isa(Function fallback, Function avx2, Function avx512, Function avx512bf16 = nullptr) {
  switch (active_isa()) {
    case Isa::Avx512:
      return avx512bf16 && has_bf16_products() ? avx512bf16 : avx512;
    case Isa::Avx2:
      return avx2;
    default:
      return fallback;
  }
}

}  // namespace dgm

// Inside the namespace of an op, in a header that launch.cpp includes:
//   DGM_DECLARE_PER_ISA(void step(const StepArgs& args, int64_t begin, int64_t end);)
// declares what cpu.cpp defines in `namespace DGM_ISA_NAMESPACE`, and in launch.cpp
//   const auto step = DGM_PICK_ISA(step);
// is the pointer to the build for this CPU. DGM_PICK_ISA_BF16 is for ops that CMakeLists.txt also builds for
// AVX512-BF16.
#ifdef DGM_HAVE_X86_ISAS
#define DGM_DECLARE_PER_ISA(...) \
  namespace isa_default {        \
  __VA_ARGS__                    \
  }                              \
  namespace isa_avx2 {           \
  __VA_ARGS__                    \
  }                              \
  namespace isa_avx512 {         \
  __VA_ARGS__                    \
  }                              \
  namespace isa_avx512bf16 {     \
  __VA_ARGS__                    \
  }
#define DGM_PICK_ISA(...) ::dgm::pick_isa(&isa_default::__VA_ARGS__, &isa_avx2::__VA_ARGS__, &isa_avx512::__VA_ARGS__)
#define DGM_PICK_ISA_BF16(...)                                                                 \
  ::dgm::pick_isa(&isa_default::__VA_ARGS__, &isa_avx2::__VA_ARGS__, &isa_avx512::__VA_ARGS__, \
                  &isa_avx512bf16::__VA_ARGS__)
#else
#define DGM_DECLARE_PER_ISA(...) \
  namespace isa_default {        \
  __VA_ARGS__                    \
  }
#define DGM_PICK_ISA(...) (&isa_default::__VA_ARGS__)
#define DGM_PICK_ISA_BF16(...) (&isa_default::__VA_ARGS__)
#endif
