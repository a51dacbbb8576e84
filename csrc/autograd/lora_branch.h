// The derivative of the low-rank branch, shared by lora_linear and merged_lora_linear.
//
//   grad_x = grad_y W + mask . s (grad_y B) A / (1 - p)      grad_A = s (grad_y B)^T drop(x)
//   grad_bias = sum of grad_y's rows                         grad_B = s grad_y^T (drop(x) A^T)
//
// W is frozen: it gets no gradient, and one that requires grad is an error. x is saved as it is: the mask is
// drawn again from its seed. The gradients have no derivative of their own: asking for one is an error.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace peft_ext {

// `enable_lora` empty stands for lora_linear.
at::Tensor lora_autograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& lora_A, const at::Tensor& lora_B, const c10::List<bool>& enable_lora,
                         double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                         const std::optional<at::Tensor>& weight_scale);

std::vector<at::Tensor> lora_backward_autograd(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               const c10::List<bool>& enable_lora, double scaling, double dropout_p,
                                               const std::optional<at::Tensor>& seed, std::array<bool, 4> needs,
                                               const std::optional<at::Tensor>& weight_scale);

}  // namespace peft_ext
