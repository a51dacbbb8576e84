#include "common/fusion_checks.h"

#include <cmath>

namespace peft_ext {
namespace {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

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
  const auto wide = output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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
  }
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, but is ", scale);
}

void check_fusion_grads(const std::optional<at::Tensor>& grad_mix, const std::optional<at::Tensor>& grad_weights,
                        at::TensorList outputs, const at::Tensor& weights, const c10::List<bool>& needs_outputs) {
  check_outputs(outputs);
  TORCH_CHECK_VALUE(needs_outputs.size() == outputs.size(), "needs_outputs must have ", outputs.size(),
                    " elements, but has ", needs_outputs.size());
  if (grad_mix) {
    TORCH_CHECK_VALUE(grad_mix->sizes() == outputs[0].sizes(), "grad_mix must be ", outputs[0].sizes(),
                      ", but has shape ", grad_mix->sizes());
    TORCH_CHECK_TYPE(grad_mix->scalar_type() == outputs[0].scalar_type(), "grad_mix is ", grad_mix->scalar_type(),
                     ", but outputs is ", outputs[0].scalar_type());
  }
  if (grad_weights) {
    TORCH_CHECK_VALUE(grad_weights->sizes() == weights.sizes(), "grad_weights must be ", weights.sizes(),
                      ", but has shape ", grad_weights->sizes());
    TORCH_CHECK_TYPE(grad_weights->scalar_type() == weights.scalar_type(), "grad_weights is ",
                     grad_weights->scalar_type(), ", but weights is ", weights.scalar_type());
  }
}

}  // namespace peft_ext
