// The low-rank branch on the CPU, shared by lora_linear and merged_lora_linear: a linear layer whose output is
// cut into equal slices, of which the enabled ones have an adapter (lora_linear: one slice).
//
// Two ways lead to y = x W^T + b + s drop(x) A^T B^T, and the counted cost decides:
//   branch   the base GEMM, then one pass over x and y that adds the branch: M r (K + N) multiply-adds;
//   merge    W' = W + s B A, then the base GEMM on W': N K r multiply-adds, cheaper once there are clearly more
//            rows M than N K / (N + K). Not with dropout, and not for bfloat16 or float16, whose W' would lose the
//            update.
// Likewise for grad_x. The hidden products are never stored: the backward recomputes them in its one pass.
//
// Threads split the rows. The gradients of A and B are summed over a number of row chunks that depends on the
// sizes alone, so that a result does not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace peft_ext {

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

}  // namespace peft_ext
