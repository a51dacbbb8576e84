// The low-rank branch on the device, shared by lora_linear and merged_lora_linear: a linear layer whose output is cut
// into equal slices, of which the enabled ones have an adapter (lora_linear: one slice).
//
//   forward   hidden = s drop(x) A^T;  y = hidden B^T + b;  y += x W^T
//   backward  grad_B = grad_y^T hidden,  grad_hidden = s grad_y B,  grad_A = grad_hidden^T drop(x),
//             grad_x = mask . (grad_hidden A) + grad_y W
//
// A branch that reaches all of y (and grad_x) is written first, and the base GEMM accumulates into it: that saves a
// pass over y. hidden is never stored for the backward, which recomputes it. The products are those of skinny.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace peft_ext::cuda {

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
                        double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                        const std::optional<at::Tensor>& weight_scale);

// The gradients of x, bias, A and B that `needs` asks for, in that order.
std::vector<at::Tensor> lora_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      at::ArrayRef<bool> enable_lora, double scaling, double dropout_p,
                                      const std::optional<at::Tensor>& seed, std::array<bool, 4> needs,
                                      const std::optional<at::Tensor>& weight_scale);

}  // namespace peft_ext::cuda
