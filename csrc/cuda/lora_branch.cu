#include "cuda/lora_branch.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include "common/lora_checks.h"
#include "common/tensors.h"
#include "cuda/quantized_weight.h"
#include "cuda/skinny.h"

namespace peft_ext::cuda {
namespace {

// An enabled slice of the output, and its adapter.
struct Slice {
  int64_t begin, width;
  at::Tensor lora_A, lora_B;
  int64_t first_rank, first_row;  // Of its factors within the whole ones.

  at::Tensor of(const at::Tensor& y) const { return y.narrow(1, begin, width); }
};

std::vector<Slice> make_slices(at::ScalarType x_type, int64_t out_features, const at::Tensor& lora_A,
                               const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora) {
  const auto factors = readable_factors({lora_A, lora_B}, x_type);
  const int64_t width = out_features / static_cast<int64_t>(enable_lora.size()), rank = lora_B.size(1);
  std::vector<Slice> slices;
  for (size_t i = 0; i < enable_lora.size(); ++i) {
    if (!enable_lora[i]) continue;
    const auto g = static_cast<int64_t>(slices.size());
    slices.push_back({static_cast<int64_t>(i) * width, width, factors[0].narrow(0, g * rank, rank),
                      factors[1].narrow(0, g * width, width), g * rank, g * width});
  }
  return slices;
}

// The mix of one adapter; it refers to dropout_p.
Mix make_mix(double scaling, const double& dropout_p, const std::optional<at::Tensor>& seed) {
  Mix mix;
  mix.scaling = scaling;
  mix.dropout_p = dropout_p;
  mix.seed = seed;
  return mix;
}

}  // namespace

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
                        double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                        const std::optional<at::Tensor>& weight_scale) {
  check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor rows = as_rows(x);
  const auto slices = make_slices(x.scalar_type(), weight.size(0), lora_A, lora_B, enable_lora);
  const Mix mix = make_mix(scaling, dropout_p, seed);
  const bool whole = enable_lora.size() == 1;
  at::Tensor y = whole ? at::empty({rows.size(0), weight.size(0)}, rows.options())
                       : frozen_linear(rows, weight, weight_scale, bias);
  for (const Slice& slice : slices) {
    const at::Tensor hidden = project(rows, slice.lora_A, Along::kRows, mix, Masked::kYes);
    expand(slice.of(y), hidden, slice.lora_B, Along::kColumns, mix, Masked::kNo, whole ? Into::kOverwrite : Into::kAdd,
           bias);
  }
  if (whole) add_frozen_product(y, rows, weight, weight_scale);
  return with_leading_sizes(y, x);
}

std::vector<at::Tensor> lora_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      at::ArrayRef<bool> enable_lora, double scaling, double dropout_p,
                                      const std::optional<at::Tensor>& seed, std::array<bool, 4> needs,
                                      const std::optional<at::Tensor>& weight_scale) {
  check_lora(x, weight, std::nullopt, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  check_lora_grad(grad_y, x, weight);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [needs_x, needs_bias, needs_A, needs_B] = needs;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const auto slices = make_slices(x.scalar_type(), weight.size(0), lora_A, lora_B, enable_lora);
  const Mix mix = make_mix(scaling, dropout_p, seed);

  at::Tensor grad_x, grad_A, grad_B;
  if (needs_x) grad_x = at::empty(rows.sizes(), rows.options());
  if (needs_A) grad_A = at::empty(lora_A.sizes(), slices[0].lora_A.options());
  if (needs_B) grad_B = at::empty(lora_B.sizes(), slices[0].lora_B.options());
  for (const Slice& slice : slices) {
    const at::Tensor grad_slice = slice.of(grad_rows);
    if (needs_B) {
      const at::Tensor hidden = project(rows, slice.lora_A, Along::kRows, mix, Masked::kYes);
      sum_rows(grad_B.narrow(0, slice.first_row, slice.width), slice.lora_B, hidden, grad_slice, Along::kColumns, mix,
               Masked::kNo);
    }
    if (!needs_A && !needs_x) continue;
    const at::Tensor grad_hidden = project(grad_slice, slice.lora_B, Along::kColumns, mix, Masked::kNo);
    if (needs_A) {
      sum_rows(grad_A.narrow(0, slice.first_rank, slice.lora_A.size(0)), slice.lora_A, grad_hidden, rows, Along::kRows,
               mix, Masked::kYes);
    }
    if (needs_x) {
      expand(grad_x, grad_hidden, slice.lora_A, Along::kRows, mix, Masked::kYes,
             slice.first_rank == 0 ? Into::kOverwrite : Into::kAdd);
    }
  }

  std::vector<at::Tensor> grads;
  if (needs_x) {
    at::addmm_out(grad_x, grad_x, grad_rows, frozen_weight(weight, weight_scale, x.scalar_type()));
    grads.push_back(with_leading_sizes(grad_x, x));
  }
  if (needs_bias) grads.push_back(grad_rows.sum(0));
  if (needs_A) grads.push_back(as_type(grad_A, lora_A.scalar_type()));
  if (needs_B) grads.push_back(as_type(grad_B, lora_B.scalar_type()));
  return grads;
}

}  // namespace peft_ext::cuda
