#include "cpu/kernels.h"

#include <c10/util/Exception.h>

#include "cpu/capability.h"

namespace peft_ext {

#define PEFT_EXT_DECLARE_UNIT(isa)                                 \
  namespace isa {                                                  \
  extern const BottleneckKernels bottleneck_kernels[kNumStorages]; \
  extern const LoraKernels lora_kernels[kNumStorages];             \
  extern const MergeKernels merge_kernels[kNumStorages];           \
  }
PEFT_EXT_DECLARE_UNIT(isa_default)
#if defined(__x86_64__)
PEFT_EXT_DECLARE_UNIT(isa_avx2)
PEFT_EXT_DECLARE_UNIT(isa_avx512)
#endif
#undef PEFT_EXT_DECLARE_UNIT

namespace {

Storage storage_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Storage::kFloat32;
    case at::kDouble:
      return Storage::kFloat64;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "no kernel for dtype ", type);
  }
}

template <class Kernels>
const Kernels& choose(at::ScalarType type, const Kernels* base, const Kernels* avx2, const Kernels* avx512) {
  const Kernels* const tables[] = {base, avx2, avx512};
  return tables[static_cast<int>(cpu_isa())][static_cast<int>(storage_of(type))];
}

}  // namespace

#if defined(__x86_64__)
#define PEFT_EXT_CHOOSE(table, type) choose(type, isa_default::table, isa_avx2::table, isa_avx512::table)
#else
#define PEFT_EXT_CHOOSE(table, type) choose(type, isa_default::table, isa_default::table, isa_default::table)
#endif

const BottleneckKernels& bottleneck_kernels(at::ScalarType type) {
  return PEFT_EXT_CHOOSE(bottleneck_kernels, type);
}

const LoraKernels& lora_kernels(at::ScalarType type) {
  return PEFT_EXT_CHOOSE(lora_kernels, type);
}

const MergeKernels& merge_kernels(at::ScalarType type) {
  return PEFT_EXT_CHOOSE(merge_kernels, type);
}

}  // namespace peft_ext
