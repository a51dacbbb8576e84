#include <torch/library.h>

#include "autograd/lora_branch.h"

namespace peft_ext {
namespace {

const c10::List<bool> kWholeOutput;

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling, double dropout_p,
                       const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& weight_scale) {
  return lora_autograd(x, weight, bias, lora_A, lora_B, kWholeOutput, scaling, dropout_p, seed, weight_scale);
}

std::vector<at::Tensor> lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                             const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling,
                                             double dropout_p, const std::optional<at::Tensor>& seed,
                                             std::array<bool, 4> needs, const std::optional<at::Tensor>& weight_scale) {
  return lora_backward_autograd(grad_y, x, weight, lora_A, lora_B, kWholeOutput, scaling, dropout_p, seed, needs,
                                weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("lora_linear", lora_linear);
  m.impl("lora_linear_backward", lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext
