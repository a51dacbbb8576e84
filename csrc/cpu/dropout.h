#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "cpu/kernels/lora_linear.h"

namespace peft_ext {

// Dropout as the kernels take it.
inline Dropout make_dropout(double p, const std::optional<at::Tensor>& seed) {
  Dropout dropout;
  dropout.threshold = static_cast<uint32_t>(std::lrint(p * 65536.0));
  if (dropout.threshold == 0) return dropout;
  const uint32_t kept = 65536 - dropout.threshold;
  dropout.scale = kept ? 65536.0 / kept : 0.0;
  dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return dropout;
}

}  // namespace peft_ext
