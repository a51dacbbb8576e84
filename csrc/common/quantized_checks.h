// What quantized_linear accepts. Each message names the argument, what it got and what it wants; TORCH_CHECK_VALUE and
// TORCH_CHECK_TYPE reach Python as ValueError and TypeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

// Columns that share 16 bytes of 4-bit values.
constexpr int64_t kColumnsPerBlock = 32;

// Whether a value is 4 bits.
inline bool is_packed(const at::Tensor& weight) {
  return weight.scalar_type() == at::kByte;
}

// Of the weight before it was quantized.
inline int64_t in_features_of(const at::Tensor& weight) {
  return is_packed(weight) ? 2 * weight.size(1) : weight.size(1);
}

void check_quantized_weight(const at::Tensor& weight, const at::Tensor& weight_scale);

void check_quantized(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                     const std::optional<at::Tensor>& bias);

void check_quantized_grad(const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& weight_scale);

}  // namespace peft_ext
