#include "common/quantized_checks.h"

#include "common/checks.h"

namespace peft_ext {
namespace {

// x or its output's gradient: [..., features].
void check_rows(const char* name, const at::Tensor& rows, const at::Tensor& weight, int64_t features) {
  TORCH_CHECK_TYPE(is_supported(rows.scalar_type()), name, " must be float32, float64, bfloat16 or float16, but is ",
                   rows.scalar_type());
  TORCH_CHECK_VALUE(rows.dim() > 0 && rows.size(-1) == features, name, " must be [..., ", features, "] for a ",
                    weight.scalar_type(), " weight ", weight.sizes(), ", but has shape ", rows.sizes());
  TORCH_CHECK_VALUE(rows.device() == weight.device(), name, " is on ", rows.device(), ", but weight on ",
                    weight.device());
}

}  // namespace

void check_quantized_weight(const at::Tensor& weight, const at::Tensor& weight_scale) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar || weight.scalar_type() == at::kByte,
                   "weight must be int8, or uint8 for 4-bit values, but is ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have 2 dimensions, but has shape ", weight.sizes());
  const int64_t in_features = in_features_of(weight);
  TORCH_CHECK_VALUE(!is_packed(weight) || in_features % kColumnsPerBlock == 0,
                    "weight of 4-bit values must have a multiple of ", kColumnsPerBlock / 2,
                    " bytes a row, but has shape ", weight.sizes());
  TORCH_CHECK_TYPE(weight_scale.scalar_type() == at::kFloat, "weight_scale must be float32, but is ",
                   weight_scale.scalar_type());
  TORCH_CHECK_VALUE(weight_scale.dim() == 2 && weight_scale.size(0) == weight.size(0) && weight_scale.size(1) > 0,
                    "weight_scale must be [", weight.size(0), ", groups] with groups > 0, but has shape ",
                    weight_scale.sizes());
  const int64_t groups = weight_scale.size(1);
  TORCH_CHECK_VALUE(groups == 1 || in_features % (groups * kColumnsPerBlock) == 0, "weight_scale has ", groups,
                    " groups, which do not cut weight's ", in_features, " columns into multiples of ",
                    kColumnsPerBlock);
  TORCH_CHECK_VALUE(weight_scale.device() == weight.device(), "weight_scale is on ", weight_scale.device(),
                    ", but weight on ", weight.device());
}

void check_quantized(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                     const std::optional<at::Tensor>& bias) {
  check_quantized_weight(weight, weight_scale);
  check_rows("x", x, weight, in_features_of(weight));
  if (!bias) return;
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [", weight.size(0),
                    "] for weight ", weight.sizes(), ", but has shape ", bias->sizes());
  TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "bias is ", bias->scalar_type(), ", but x is ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(bias->device() == weight.device(), "bias is on ", bias->device(), ", but weight on ",
                    weight.device());
}

void check_quantized_grad(const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& weight_scale) {
  check_quantized_weight(weight, weight_scale);
  check_rows("grad_y", grad_y, weight, weight.size(0));
}

}  // namespace peft_ext
