#include "cpu/capability.h"

#include <ATen/Version.h>

#include <string>

namespace peft_ext {
namespace {

bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#ifdef __x86_64__
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa detect_isa() {
  const std::string torch_uses = at::get_cpu_capability();
  if (torch_uses == "AVX512" && has_avx512()) {
    return Isa::AVX512;
  }
  if ((torch_uses == "AVX512" || torch_uses == "AVX2") && has_avx2()) {
    return Isa::AVX2;
  }
  return Isa::DEFAULT;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::AVX512:
      return "avx512";
    case Isa::AVX2:
      return "avx2";
    case Isa::DEFAULT:
      break;
  }
  return "default";
}

}  // namespace peft_ext
