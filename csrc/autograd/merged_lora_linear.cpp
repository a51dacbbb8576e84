#include <torch/library.h>

#include "autograd/lora_branch.h"

namespace peft_ext {
namespace {

at::Tensor merged_lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const at::Tensor& lora_A, const at::Tensor& lora_B, const c10::List<bool>& enable_lora,
                              double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                              const std::optional<at::Tensor>& weight_scale) {
  // An empty list would mean lora_linear to lora_autograd.
  TORCH_CHECK_VALUE(!enable_lora.empty(), "enable_lora must enable a slice, but is empty");
  return lora_autograd(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("merged_lora_linear", merged_lora_linear);
  m.impl("merged_lora_linear_backward", lora_backward_autograd);
}

}  // namespace
}  // namespace peft_ext
