// The frozen weight of a linear layer on the CPU: a matrix of x's type, or int8 or 4-bit values and their scales.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

// y += left right.
void add_product(const at::Tensor& y, const at::Tensor& left, const at::Tensor& right);

struct FrozenWeight {
  FrozenWeight(const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale)
      : weight(weight), weight_scale(weight_scale) {}

  bool is_quantized() const { return weight_scale.has_value(); }

  // rows W^T + bias.
  at::Tensor product(const at::Tensor& rows, const std::optional<at::Tensor>& bias) const;

  // grad_rows W.
  at::Tensor product_backward(const at::Tensor& grad_rows) const;

  const at::Tensor weight;
  const std::optional<at::Tensor> weight_scale;
};

}  // namespace peft_ext
