#include <ATen/ops/matmul.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/quantized_checks.h"
#include "common/tensors.h"
#include "cuda/quantized_weight.h"

namespace peft_ext::cuda {
namespace {

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& bias) {
  check_quantized(x, weight, weight_scale, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  return with_leading_sizes(frozen_linear(as_rows(x), weight, weight_scale, bias), x);
}

at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale) {
  check_quantized_grad(grad_y, weight, weight_scale);
  const c10::cuda::CUDAGuard guard(grad_y.device());
  return at::matmul(grad_y, dequantized(weight, weight_scale, grad_y.scalar_type()));
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("quantized_linear", quantized_linear);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
