// Chooses among the kernel units that the build compiled per instruction set (cpu/kernels/isa.txt).
#pragma once

#include <c10/core/ScalarType.h>

#include "common/checks.h"
#include "cpu/kernels/adapter_fusion.h"
#include "cpu/kernels/bottleneck_adapter.h"
#include "cpu/kernels/kron_linear.h"
#include "cpu/kernels/lora_linear.h"
#include "cpu/kernels/lora_merge_.h"
#include "cpu/kernels/prefix_attention.h"
#include "cpu/kernels/quantized_linear.h"

// The kernels of every op that has some: the type of its table, and the table's name.
#define PEFT_EXT_KERNEL_TABLES(TABLE)                     \
  TABLE(FusionKernels, fusion_kernels)                    \
  TABLE(BottleneckKernels, bottleneck_kernels)            \
  TABLE(KronKernels, kron_kernels)                        \
  TABLE(LoraKernels, lora_kernels)                        \
  TABLE(MergeKernels, merge_kernels)                      \
  TABLE(PrefixAttentionKernels, prefix_attention_kernels) \
  TABLE(QuantizedKernels, quantized_kernels)

namespace peft_ext {

#define PEFT_EXT_DECLARE_CHOICE(Kernels, table) const Kernels& table(at::ScalarType type);
PEFT_EXT_KERNEL_TABLES(PEFT_EXT_DECLARE_CHOICE)
#undef PEFT_EXT_DECLARE_CHOICE

}  // namespace peft_ext
