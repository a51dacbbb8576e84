// The derivative of adapter_fusion. With q' = q K the folded query, the backward op gives those of q' and of the
// outputs, and from there
//
//   grad_q = grad_q' K^T        grad_K = q^T grad_q'        grad_b = 0
//
// The last exactly: q . b is the same for all adapters, and the softmax does not see it. Saved are the arguments, q'
// and the weights, neither keys nor stacked outputs.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"
#include "common/no_autocast.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Result adapter_fusion(const at::Tensor& query, at::TensorList outputs, const OptionalTensor& key_weight,
                      const OptionalTensor& key_bias, double scale);

std::vector<at::Tensor> adapter_fusion_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                                const at::Tensor& folded_query, at::TensorList outputs,
                                                const at::Tensor& weights, double scale, bool needs_query,
                                                const c10::List<bool>& needs_outputs);

Result call_forward(const at::Tensor& query, at::TensorList outputs, const OptionalTensor& key_weight,
                    const OptionalTensor& key_bias, double scale) {
  static const auto op = find_op<decltype(adapter_fusion)>("peft_ext::adapter_fusion");
  return op.call(query, outputs, key_weight, key_bias, scale);
}

std::vector<at::Tensor> call_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                      const at::Tensor& folded_query, at::TensorList outputs, const at::Tensor& weights,
                                      double scale, bool needs_query, const c10::List<bool>& needs_outputs) {
  static const auto op = find_op<decltype(adapter_fusion_backward)>("peft_ext::adapter_fusion_backward");
  return op.call(grad_mix, grad_weights, folded_query, outputs, weights, scale, needs_query, needs_outputs);
}

class AdapterFusion : public torch::autograd::Function<AdapterFusion> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& query, const OptionalTensor& key_weight,
                               const OptionalTensor& key_bias, at::TensorList outputs, double scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [mix, weights, folded_query] = call_forward(query, outputs, key_weight, key_bias, scale);
    variable_list saved = {query, key_weight.value_or(at::Tensor()), key_bias.value_or(at::Tensor()),
                           key_weight ? folded_query : query, weights};
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({folded_query});
    ctx->set_materialize_grads(false);
    return {mix, weights, folded_query};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const NoAutocast products_keep_their_types;
    constexpr size_t kQuery = 0, kWeight = 1, kBias = 2, kOutputs = 3;  // Where forward has them.
    const auto saved = ctx->get_saved_variables();
    const auto &query = saved[0], &key_weight = saved[1], &key_bias = saved[2], &folded_query = saved[3],
               &weights = saved[4];
    const std::vector<at::Tensor> outputs(saved.begin() + 5, saved.end());
    variable_list result(kOutputs + outputs.size() + 1);
    if (!grads[0].defined() && !grads[1].defined()) return result;

    // needs_input_grad counts the tensors that are there.
    size_t edge = 0;
    const bool needs_query = ctx->needs_input_grad(edge++);
    const bool needs_weight = key_weight.defined() && ctx->needs_input_grad(edge++);
    const bool needs_bias = key_bias.defined() && ctx->needs_input_grad(edge++);
    c10::List<bool> needs_outputs;
    for (size_t i = 0; i < outputs.size(); ++i) needs_outputs.push_back(ctx->needs_input_grad(edge++));

    const auto found = call_backward(if_defined(grads[0]), if_defined(grads[1]), folded_query, outputs, weights,
                                     ctx->saved_data["scale"].toDouble(), needs_query || needs_weight, needs_outputs);
    auto next = found.begin();
    if (needs_query || needs_weight) {
      const at::Tensor& grad_folded = *next++;
      if (needs_query) result[kQuery] = key_weight.defined() ? at::matmul(grad_folded, key_weight.t()) : grad_folded;
      if (needs_weight) result[kWeight] = outer_product(query, grad_folded);
    }
    if (needs_bias) result[kBias] = at::zeros_like(key_bias);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (needs_outputs[i]) result[kOutputs + i] = *next++;
    }
    return result;
  }

 private:
  // Summed over all rows.
  static at::Tensor outer_product(const at::Tensor& a, const at::Tensor& b) {
    return a.dim() == 1 ? at::outer(a, b) : at::mm(a.flatten(0, -2).t(), b.flatten(0, -2));
  }
};

class AdapterFusionBackward : public torch::autograd::Function<AdapterFusionBackward> {
 public:
  static variable_list forward(AutogradContext*, const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                               const Variable& folded_query, at::TensorList outputs, const Variable& weights,
                               double scale, bool needs_query, const c10::List<bool>& needs_outputs) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_mix, grad_weights, folded_query, outputs, weights, scale, needs_query, needs_outputs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "the gradients of adapter_fusion have no derivative: double backward is not implemented");
  }
};

Result adapter_fusion(const at::Tensor& query, at::TensorList outputs, const OptionalTensor& key_weight,
                      const OptionalTensor& key_bias, double scale) {
  check_no_tangent("adapter_fusion", query, outputs, key_weight, key_bias);
  if (!any_requires_grad(query, outputs, key_weight, key_bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(query, outputs, key_weight, key_bias, scale);
  }
  const auto result = AdapterFusion::apply(query, key_weight, key_bias, outputs, scale);
  return {result[0], result[1], result[2]};
}

std::vector<at::Tensor> adapter_fusion_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                                const at::Tensor& folded_query, at::TensorList outputs,
                                                const at::Tensor& weights, double scale, bool needs_query,
                                                const c10::List<bool>& needs_outputs) {
  check_no_tangent("adapter_fusion_backward", grad_mix, grad_weights, folded_query, outputs, weights);
  if (!any_requires_grad(grad_mix, grad_weights, folded_query, outputs, weights)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_mix, grad_weights, folded_query, outputs, weights, scale, needs_query, needs_outputs);
  }
  return AdapterFusionBackward::apply(grad_mix, grad_weights, folded_query, outputs, weights, scale, needs_query,
                                      needs_outputs);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("adapter_fusion", adapter_fusion);
  m.impl("adapter_fusion_backward", adapter_fusion_backward);
}

}  // namespace
}  // namespace peft_ext
