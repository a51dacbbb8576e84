#include <ATen/core/List.h>
#include <torch/library.h>

#include "common/lora_checks.h"
#include "cpu/lora_branch.h"

namespace peft_ext {
namespace {

at::Tensor merged_lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const at::Tensor& lora_A, const at::Tensor& lora_B, const c10::List<bool>& enable_lora,
                              double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                              const std::optional<at::Tensor>& weight_scale) {
  return lora_forward(x, weight, bias, lora_A, lora_B, as_array(enable_lora), scaling, dropout_p, seed, weight_scale);
}

std::vector<at::Tensor> merged_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& weight, const at::Tensor& lora_A,
                                                    const at::Tensor& lora_B, const c10::List<bool>& enable_lora,
                                                    double scaling, double dropout_p,
                                                    const std::optional<at::Tensor>& seed, std::array<bool, 4> needs,
                                                    const std::optional<at::Tensor>& weight_scale) {
  return lora_backward(grad_y, x, weight, lora_A, lora_B, as_array(enable_lora), scaling, dropout_p, seed, needs,
                       weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("merged_lora_linear", merged_lora_linear);
  m.impl("merged_lora_linear_backward", merged_lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext
