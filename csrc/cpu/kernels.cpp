#include "cpu/kernels.h"

#include <c10/util/Exception.h>

#include "cpu/capability.h"

namespace peft_ext {

#define PEFT_EXT_DECLARE_TABLE(Kernels, table) extern const Kernels table[kNumStorages];
namespace isa_default {
PEFT_EXT_KERNEL_TABLES(PEFT_EXT_DECLARE_TABLE)
}
#if defined(__x86_64__)
namespace isa_avx2 {
PEFT_EXT_KERNEL_TABLES(PEFT_EXT_DECLARE_TABLE)
}
namespace isa_avx512 {
PEFT_EXT_KERNEL_TABLES(PEFT_EXT_DECLARE_TABLE)
}
#endif
#undef PEFT_EXT_DECLARE_TABLE

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
#define PEFT_EXT_DEFINE_CHOICE(Kernels, table)                                   \
  const Kernels& table(at::ScalarType type) {                                    \
    return choose(type, isa_default::table, isa_avx2::table, isa_avx512::table); \
  }
#else
#define PEFT_EXT_DEFINE_CHOICE(Kernels, table)                                       \
  const Kernels& table(at::ScalarType type) {                                        \
    return choose(type, isa_default::table, isa_default::table, isa_default::table); \
  }
#endif
PEFT_EXT_KERNEL_TABLES(PEFT_EXT_DEFINE_CHOICE)

}  // namespace peft_ext
