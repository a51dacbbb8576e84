// What kron_linear accepts. Each message names the argument, what it got and what it wants; TORCH_CHECK_VALUE and
// TORCH_CHECK_TYPE reach Python as ValueError and TypeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

void check_kron(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const std::optional<at::Tensor>& t,
                const std::optional<at::Tensor>& bias, double scaling);

void check_kron_grad(const at::Tensor& grad_y, const at::Tensor& x, int64_t out_features);

}  // namespace peft_ext
