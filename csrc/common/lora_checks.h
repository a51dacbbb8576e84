// What the LoRA ops accept. Each message names the argument, what it got and what it wants; TORCH_CHECK_VALUE
// and TORCH_CHECK_TYPE reach Python as ValueError and TypeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

// An output of `enable_lora.size()` equal slices, of which the enabled ones have an adapter.
void check_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora, double scaling,
                double dropout_p, const std::optional<at::Tensor>& seed);

void check_lora_grad(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight);

void check_lora_merge(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling);

void check_residual(const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& outliers);

int64_t count_enabled(at::ArrayRef<bool> enable_lora);

}  // namespace peft_ext
