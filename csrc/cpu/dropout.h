#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/dropout.h"
#include "cpu/kernels/lora_linear.h"

namespace peft_ext {

// Dropout as the kernels take it.
inline Dropout make_dropout(double p, const std::optional<at::Tensor>& seed) {
  Dropout dropout;
  const DropoutRate rate(p);
  dropout.threshold = rate.threshold;
  dropout.scale = rate.scale;
  if (rate.threshold == 0) return dropout;
  dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return dropout;
}

// A fresh seed [1] from torch's generator, the one that at::randint would give.
at::Tensor draw_seed();

}  // namespace peft_ext
