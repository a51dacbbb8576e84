// A quantized frozen weight on the device: dequantized whole by ATen before its products. The model's memory stays
// small but for one layer's weight at a time; there is no fused kernel yet.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include <optional>

#include "common/checks.h"
#include "common/quantized_checks.h"

namespace peft_ext::cuda {

// [out_features, in_features]; how 4-bit values lie: cpu/kernels/quantized_linear.h.
inline at::Tensor dequantized(const at::Tensor& weight, const at::Tensor& weight_scale, at::ScalarType type) {
  const int64_t n = weight.size(0), k = in_features_of(weight);
  const at::ScalarType acc = acc_type(type);
  at::Tensor values = weight;
  if (is_packed(weight)) {
    const at::Tensor bytes = weight.reshape({n, k / kColumnsPerBlock, kColumnsPerBlock / 2});
    values = at::cat({bytes.bitwise_and(15), bytes.bitwise_right_shift(4)}, 2);
  }
  const int64_t groups = weight_scale.size(1);
  values = values.reshape({n, groups, k / groups}).to(acc);
  if (is_packed(weight)) values = values.sub(8);
  return values.mul(weight_scale.to(acc).unsqueeze(2)).reshape({n, k}).to(type);
}

// The weight as a matrix of `type`, whichever way it is kept.
inline at::Tensor frozen_weight(const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                                at::ScalarType type) {
  return weight_scale ? dequantized(weight, *weight_scale, type) : weight;
}

}  // namespace peft_ext::cuda
