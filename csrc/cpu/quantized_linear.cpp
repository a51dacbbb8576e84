#include <torch/library.h>

#include "common/quantized_checks.h"
#include "common/tensors.h"
#include "cpu/frozen_weight.h"

namespace peft_ext {
namespace {

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& bias) {
  check_quantized(x, weight, weight_scale, bias);
  return with_leading_sizes(FrozenWeight(weight, weight_scale).product(as_rows(x), bias), x);
}

at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale) {
  check_quantized_grad(grad_y, weight, weight_scale);
  return with_leading_sizes(FrozenWeight(weight, weight_scale).product_backward(as_rows(grad_y)), grad_y);
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("quantized_linear", quantized_linear);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace
}  // namespace peft_ext
