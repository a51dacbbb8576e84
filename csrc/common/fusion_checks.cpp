#include "common/fusion_checks.h"

#include <cmath>

#include "common/checks.h"

namespace peft_ext {
namespace {

void check_outputs(at::TensorList outputs) {
  TORCH_CHECK_VALUE(!outputs.empty(), "outputs must hold the output of at least one adapter, but is empty");
  const auto& first = outputs[0];
  TORCH_CHECK_TYPE(is_supported(first.scalar_type()), "outputs must be float32, float64, bfloat16 or float16, but is ",
                   first.scalar_type());
  TORCH_CHECK_VALUE(first.dim() > 0, "outputs must be [..., width], but outputs[0] has shape ", first.sizes());
  for (size_t i = 1; i < outputs.size(); ++i) {
    TORCH_CHECK_VALUE(outputs[i].sizes() == first.sizes(), "outputs must have one shape, but outputs[0] has ",
                      first.sizes(), " and outputs[", i, "] ", outputs[i].sizes());
    TORCH_CHECK_TYPE(outputs[i].scalar_type() == first.scalar_type(), "outputs must have one dtype, but outputs[0] is ",
                     first.scalar_type(), " and outputs[", i, "] ", outputs[i].scalar_type());
    TORCH_CHECK_VALUE(outputs[i].device() == first.device(), "outputs must be on one device, but outputs[0] is on ",
                      first.device(), " and outputs[", i, "] on ", outputs[i].device());
  }
}

void check_key(const at::Tensor& query, const at::Tensor& output, const at::Tensor& key_weight) {
  TORCH_CHECK_VALUE(
      key_weight.dim() == 2 && key_weight.size(0) == query.size(-1) && key_weight.size(1) == output.size(-1),
      "key_weight must be [", query.size(-1), ", ", output.size(-1), "] for query ", query.sizes(), " and outputs ",
      output.sizes(), ", but has shape ", key_weight.sizes());
  TORCH_CHECK_TYPE(key_weight.scalar_type() == query.scalar_type(), "key_weight is ", key_weight.scalar_type(),
                   ", but query is ", query.scalar_type());
  TORCH_CHECK_VALUE(key_weight.device() == query.device(), "key_weight is on ", key_weight.device(), ", but query on ",
                    query.device());
}

}  // namespace

void check_fusion(const at::Tensor& query, at::TensorList outputs, const std::optional<at::Tensor>& key_weight,
                  const std::optional<at::Tensor>& key_bias, double scale) {
  check_outputs(outputs);
  const auto& output = outputs[0];
  const auto wide = acc_type(output.scalar_type());
  TORCH_CHECK_TYPE(query.scalar_type() == output.scalar_type() || query.scalar_type() == wide, "query is ",
                   query.scalar_type(), ", but outputs is ", output.scalar_type());
  TORCH_CHECK_VALUE(query.device() == output.device(), "query is on ", query.device(), ", but outputs on ",
                    output.device());
  const bool leads = query.dim() == 1 || (query.dim() == output.dim() && query.sizes().slice(0, query.dim() - 1) ==
                                                                             output.sizes().slice(0, output.dim() - 1));
  TORCH_CHECK_VALUE(leads, "query must be [width], or have the leading sizes of outputs ", output.sizes(),
                    ", but has shape ", query.sizes());
  if (key_weight) {
    check_key(query, output, *key_weight);
  } else {
    TORCH_CHECK_VALUE(query.size(-1) == output.size(-1), "query must be [..., ", output.size(-1), "] for outputs ",
                      output.sizes(), " without key_weight, but has shape ", query.sizes());
  }
  if (key_bias) {
    TORCH_CHECK_VALUE(key_bias->dim() == 1 && key_bias->size(0) == query.size(-1), "key_bias must be [", query.size(-1),
                      "] for query ", query.sizes(), ", but has shape ", key_bias->sizes());
    TORCH_CHECK_TYPE(key_bias->scalar_type() == query.scalar_type(), "key_bias is ", key_bias->scalar_type(),
                     ", but query is ", query.scalar_type());
    TORCH_CHECK_VALUE(key_bias->device() == query.device(), "key_bias is on ", key_bias->device(), ", but query on ",
                      query.device());
  }
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, but is ", scale);
}

void check_fusion_saved(const std::optional<at::Tensor>& grad_mix, const std::optional<at::Tensor>& grad_weights,
                        at::TensorList outputs, const at::Tensor& weights, const c10::List<bool>& needs_outputs) {
  const auto& output = outputs[0];
  const auto type = acc_type(output.scalar_type());
  const auto weights_sizes = with_last_size(output.sizes(), static_cast<int64_t>(outputs.size()));
  check_saved("weights", weights, weights_sizes, type, output.device());
  if (grad_mix) check_saved("grad_mix", *grad_mix, output.sizes(), output.scalar_type(), output.device());
  if (grad_weights) check_saved("grad_weights", *grad_weights, weights_sizes, type, output.device());
  TORCH_CHECK_VALUE(needs_outputs.size() == outputs.size(), "needs_outputs must have ", outputs.size(),
                    " elements, but has ", needs_outputs.size());
}

}  // namespace peft_ext
