// Chooses among the kernel units that the build compiled per instruction set (cpu/kernels/isa.txt).
#pragma once

#include <c10/core/ScalarType.h>

#include "cpu/kernels/bottleneck_adapter.h"
#include "cpu/kernels/lora_linear.h"
#include "cpu/kernels/lora_merge_.h"

namespace peft_ext {

inline at::ScalarType acc_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

const BottleneckKernels& bottleneck_kernels(at::ScalarType type);
const LoraKernels& lora_kernels(at::ScalarType type);
const MergeKernels& merge_kernels(at::ScalarType type);

}  // namespace peft_ext
