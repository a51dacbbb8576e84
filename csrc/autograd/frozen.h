#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

namespace peft_ext {

// The base weight is frozen: no op gives it a gradient.
inline void check_frozen(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && weight.requires_grad()),
                    "weight requires grad, but is frozen here: call weight.requires_grad_(False) first");
}

}  // namespace peft_ext
