#pragma once

namespace peft_ext {

// The instruction sets of cpu/kernels/isa.txt; DEFAULT is what every processor of the platform has.
enum class Isa { DEFAULT, AVX2, AVX512 };

// The best set that this processor has and that PyTorch uses too: ATEN_CPU_CAPABILITY lowers both.
Isa cpu_isa();

// Whether bfloat16 may be multiplied on AMX tiles, by the units of AVX512. ATEN_CPU_CAPABILITY, even as avx512, is
// without.
bool cpu_has_amx();

// The name in isa.txt.
const char* isa_name(Isa isa);

}  // namespace peft_ext
