// multi_lora_linear on the device: every row's own branch by the products of skinny.h, then the base GEMM over all rows
// accumulates into it, as in lora_branch.h. The kernels read index and scalings where they are: nothing is copied to
// the host, and a captured graph serves any mix of the same adapters. An index outside [-1, adapters) counts as -1.
//
//   forward   hidden_i = s_a drop_a(x_i) A_a^T;  y_i = hidden_i B_a^T + b + x_i W^T,  a = index_i;  -1: no branch
//   backward  as cuda/lora_branch.h, the gradients of A_a and B_a summed over the rows of a
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/lora_checks.h"
#include "common/tensors.h"
#include "cuda/quantized_weight.h"
#include "cuda/skinny.h"

namespace peft_ext::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Flags = c10::List<bool>;

Mix make_mix(const at::Tensor& scalings, const at::Tensor& index, at::ArrayRef<double> dropout_p,
             const OptionalTensor& seed) {
  Mix mix;
  mix.index = index.contiguous();
  mix.scalings = as_type(scalings, at::kDouble).contiguous();
  mix.dropout_p = dropout_p;
  mix.seed = seed;
  return mix;
}

at::Tensor multi_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                             at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                             const at::Tensor& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                             const OptionalTensor& weight_scale) {
  check_multi_lora(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor rows = as_rows(x);
  if (lora_A.empty()) return with_leading_sizes(frozen_linear(rows, weight, weight_scale, bias), x);
  const Mix mix = make_mix(scalings, index, dropout_p, seed);
  const at::Tensor hidden = project(rows, readable_factors(lora_A, x.scalar_type()), Along::kRows, mix, Masked::kYes);
  at::Tensor y = at::empty({rows.size(0), weight.size(0)}, rows.options());
  expand(y, hidden, readable_factors(lora_B, x.scalar_type()), Along::kColumns, mix, Masked::kNo, Into::kOverwrite,
         bias);
  add_frozen_product(y, rows, weight, weight_scale);
  return with_leading_sizes(y, x);
}

// Gradients like `factors`, where they are asked for.
std::vector<at::Tensor> empty_grads(at::TensorList factors, const Flags& needs) {
  std::vector<at::Tensor> grads(factors.size());
  for (size_t a = 0; a < factors.size(); ++a) {
    if (needs[a]) grads[a] = at::empty(factors[a].sizes(), factors[a].options());
  }
  return grads;
}

void append(std::vector<at::Tensor>& grads, at::TensorList more, at::TensorList factors) {
  for (size_t a = 0; a < more.size(); ++a) {
    if (more[a].defined()) grads.push_back(as_type(more[a], factors[a].scalar_type()));
  }
}

bool any(const Flags& needs) {
  for (const bool need : needs) {
    if (need) return true;
  }
  return false;
}

std::vector<at::Tensor> multi_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                   const at::Tensor& weight, at::TensorList lora_A,
                                                   at::TensorList lora_B, const at::Tensor& scalings,
                                                   const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                                   const OptionalTensor& seed, bool needs_x, bool needs_bias,
                                                   const Flags& needs_A, const Flags& needs_B,
                                                   const OptionalTensor& weight_scale) {
  check_multi_lora(x, weight, std::nullopt, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  check_multi_lora_saved(grad_y, x, weight, lora_A, needs_A, needs_B);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = needs_x ? frozen_weight(weight, weight_scale, x.scalar_type()) : at::Tensor();
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const Mix mix = make_mix(scalings, index, dropout_p, seed);
  const auto readable_A = readable_factors(lora_A, x.scalar_type());
  const auto readable_B = readable_factors(lora_B, x.scalar_type());
  const auto grads_A = empty_grads(readable_A, needs_A), grads_B = empty_grads(readable_B, needs_B);
  const bool any_A = any(needs_A);

  std::vector<at::Tensor> grads;
  at::Tensor grad_x;
  if (needs_x) {
    grad_x = at::empty(rows.sizes(), rows.options());
    grads.push_back(with_leading_sizes(grad_x, x));
  }
  if (needs_bias) grads.push_back(grad_rows.sum(0));
  if (any(needs_B)) {
    const at::Tensor hidden = project(rows, readable_A, Along::kRows, mix, Masked::kYes);
    sum_rows(grads_B, readable_B, hidden, grad_rows, Along::kColumns, mix, Masked::kNo);
  }
  if (needs_x && lora_A.empty()) at::mm_out(grad_x, grad_rows, dense);
  if (!lora_A.empty() && (any_A || needs_x)) {
    const at::Tensor grad_hidden = project(grad_rows, readable_B, Along::kColumns, mix, Masked::kNo);
    if (any_A) sum_rows(grads_A, readable_A, grad_hidden, rows, Along::kRows, mix, Masked::kYes);
    if (needs_x) {
      expand(grad_x, grad_hidden, readable_A, Along::kRows, mix, Masked::kYes, Into::kOverwrite);
      at::addmm_out(grad_x, grad_x, grad_rows, dense);
    }
  }
  append(grads, grads_A, lora_A);
  append(grads, grads_B, lora_B);
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
