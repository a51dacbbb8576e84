// What adapter_fusion accepts. Each message names the argument, what it got and what it wants.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

void check_fusion(const at::Tensor& query, at::TensorList outputs, const std::optional<at::Tensor>& key_weight,
                  const std::optional<at::Tensor>& key_bias, double scale);

// What the backward gets besides; `outputs` are checked already.
void check_fusion_saved(const std::optional<at::Tensor>& grad_mix, const std::optional<at::Tensor>& grad_weights,
                        at::TensorList outputs, const at::Tensor& weights, const c10::List<bool>& needs_outputs);

}  // namespace peft_ext
