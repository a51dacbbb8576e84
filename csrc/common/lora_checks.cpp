#include "common/lora_checks.h"

#include <algorithm>
#include <cmath>

#include "common/checks.h"

namespace peft_ext {
namespace {

void check_matrix(const char* name, const at::Tensor& tensor, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()), name, " must be float32, float64, bfloat16 or float16, but is ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must have 2 dimensions, but has shape ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), name, " is on ", tensor.device(), ", but weight on ",
                    weight.device());
}

void check_factors(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, int64_t groups,
                   int64_t slices, double scaling) {
  check_matrix("weight", weight, weight);
  check_matrix("lora_A", lora_A, weight);
  check_matrix("lora_B", lora_B, weight);
  TORCH_CHECK_TYPE(lora_A.scalar_type() == lora_B.scalar_type(), "lora_A is ", lora_A.scalar_type(), " and lora_B ",
                   lora_B.scalar_type(), ": both must have one dtype");
  TORCH_CHECK_TYPE(lora_A.scalar_type() != at::kDouble || weight.scalar_type() == at::kDouble,
                   "lora_A is float64, which only a float64 weight takes, but weight is ", weight.scalar_type());
  const int64_t rank = lora_B.size(1);
  TORCH_CHECK_VALUE(rank > 0, "lora_B must be [out_features, rank] with rank > 0, but has shape ", lora_B.sizes());
  TORCH_CHECK_VALUE(lora_A.size(0) == groups * rank && lora_A.size(1) == weight.size(1), "lora_A must be [",
                    groups * rank, ", ", weight.size(1), "] for weight ", weight.sizes(), " and lora_B ",
                    lora_B.sizes(), ", but has shape ", lora_A.sizes());
  TORCH_CHECK_VALUE(lora_B.size(0) == groups * (weight.size(0) / slices), "lora_B must be [",
                    groups * (weight.size(0) / slices), ", rank] for weight ", weight.sizes(), ", but has shape ",
                    lora_B.sizes());
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, but is ", scaling);
}

}  // namespace

int64_t count_enabled(at::ArrayRef<bool> enable_lora) {
  return std::count(enable_lora.begin(), enable_lora.end(), true);
}

void check_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora, double scaling,
                double dropout_p, const std::optional<at::Tensor>& seed) {
  const int64_t groups = count_enabled(enable_lora), slices = static_cast<int64_t>(enable_lora.size());
  TORCH_CHECK_VALUE(groups > 0, "enable_lora must enable a slice, but is ", enable_lora);
  TORCH_CHECK_VALUE(weight.dim() != 2 || weight.size(0) % slices == 0, "enable_lora has ", slices,
                    " slices, which do not divide weight's ", weight.dim() == 2 ? weight.size(0) : 0, " outputs");
  check_factors(weight, lora_A, lora_B, groups, slices, scaling);
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "x is ", x.scalar_type(), ", but weight is ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(x.device() == weight.device(), "x is on ", x.device(), ", but weight on ", weight.device());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == weight.size(1), "x must be [..., ", weight.size(1), "] for weight ",
                    weight.sizes(), ", but has shape ", x.sizes());
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [", weight.size(0),
                      "] for weight ", weight.sizes(), ", but has shape ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == weight.scalar_type(), "bias is ", bias->scalar_type(), ", but weight is ",
                     weight.scalar_type());
    TORCH_CHECK_VALUE(bias->device() == weight.device(), "bias is on ", bias->device(), ", but weight on ",
                      weight.device());
  }
  check_dropout(dropout_p, seed, x.device());
}

void check_lora_grad(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight) {
  check_saved("grad_y", grad_y, with_last_size(x.sizes(), weight.size(0)), x.scalar_type(), x.device());
}

void check_lora_merge(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling) {
  check_factors(weight, lora_A, lora_B, 1, 1, scaling);
  for (int64_t dim = 0; dim < 2; ++dim) {
    TORCH_CHECK_VALUE(weight.stride(dim) != 0 || weight.size(dim) <= 1,
                      "weight shares memory among its elements (strides ", weight.strides(), "): clone it first");
  }
}

void check_residual(const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& outliers) {
  TORCH_CHECK_TYPE(residual.scalar_type() == at::kChar, "residual must be int8, but is ", residual.scalar_type());
  TORCH_CHECK_VALUE(residual.sizes() == weight.sizes(), "residual must have weight's shape ", weight.sizes(),
                    ", but has shape ", residual.sizes());
  TORCH_CHECK_TYPE(outliers.scalar_type() == weight.scalar_type(), "outliers is ", outliers.scalar_type(),
                   ", but weight is ", weight.scalar_type());
  TORCH_CHECK_VALUE(outliers.dim() == 1, "outliers must have 1 dimension, but has shape ", outliers.sizes());
  TORCH_CHECK_VALUE(residual.device() == weight.device() && outliers.device() == weight.device(), "residual is on ",
                    residual.device(), " and outliers on ", outliers.device(), ", but weight on ", weight.device());
}

}  // namespace peft_ext
