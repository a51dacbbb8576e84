// Products with the frozen weight of a layer, whether it is dense or quantized (weight_scale there).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext::cuda {

// A quantized weight as [out_features, in_features] of `type`.
at::Tensor dequantized(const at::Tensor& weight, const at::Tensor& weight_scale, at::ScalarType type);

// The weight as a matrix of `type`, whichever way it is kept.
inline at::Tensor frozen_weight(const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                                at::ScalarType type) {
  return weight_scale ? dequantized(weight, *weight_scale, type) : weight;
}

// x W^T + b for x [M, in_features] with contiguous rows.
at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                         const std::optional<at::Tensor>& bias);

// y += x W^T for contiguous y [M, out_features].
void add_frozen_product(at::Tensor& y, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& weight_scale);

}  // namespace peft_ext::cuda
