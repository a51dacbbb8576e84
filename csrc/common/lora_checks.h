// What the LoRA ops accept. Each message names the argument, what it got and what it wants; TORCH_CHECK_VALUE
// and TORCH_CHECK_TYPE reach Python as ValueError and TypeError.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>

namespace peft_ext {

// Of a weight with `weight_scale`, quantized, x has the type that a plain weight has.
//
// An output of `enable_lora.size()` equal slices, of which the enabled ones have an adapter.
void check_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora, double scaling,
                double dropout_p, const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& weight_scale);

// All arguments of multi_lora_linear but the values of `scalings` and `index`.
void check_multi_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings, const at::Tensor& index,
                      at::ArrayRef<double> dropout_p, const std::optional<at::Tensor>& seed,
                      const std::optional<at::Tensor>& weight_scale);

// What its backward gets beside them.
void check_multi_lora_saved(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                            at::TensorList lora_A, const c10::List<bool>& needs_A, const c10::List<bool>& needs_B);

void check_lora_grad(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight);

void check_lora_merge(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling);

void check_residual(const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& outliers);

int64_t count_enabled(at::ArrayRef<bool> enable_lora);

// A List has no contiguous storage of bools.
c10::SmallVector<bool, 8> as_array(const c10::List<bool>& list);

}  // namespace peft_ext
