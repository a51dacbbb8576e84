#include "cpu/capability.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif

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

bool has_amx() {
#ifdef __x86_64__
  // By their bits, as not every compiler knows their names.
  constexpr unsigned kAmxBFloat16 = 1u << 22, kAmxTile = 1u << 24, kAvx512BFloat16 = 1u << 5;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBFloat16) || !(edx & kAmxTile)) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvx512BFloat16);
#else
  return false;
#endif
}

// The system hands out the registers of the tiles on request.
bool detect_amx() {
  return cpu_isa() == Isa::AVX512 && !std::getenv("ATEN_CPU_CAPABILITY") && has_amx() && at::cpu::init_amx();
}

}  // namespace

bool cpu_has_amx() {
  static const bool has_amx = detect_amx();
  return has_amx;
}

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
