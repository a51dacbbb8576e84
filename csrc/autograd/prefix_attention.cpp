// The derivative of prefix_attention, for q, k, v, prefix_key and prefix_value. Saved are the arguments, the result
// and the log-sum-exp of each query: probabilities are formed again, and the dropout mask is drawn again from its seed.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Needs = std::array<bool, 5>;
using Result = std::tuple<at::Tensor, at::Tensor>;

Result call_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
                    const at::Tensor& prefix_value, const OptionalTensor& attn_mask, bool is_causal, double scale,
                    double dropout_p, const OptionalTensor& seed) {
  static const auto op = find_op<decltype(call_forward)>("peft_ext::prefix_attention");
  return op.call(q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const at::Tensor& prefix_key, const at::Tensor& prefix_value,
                                      const OptionalTensor& attn_mask, const at::Tensor& out, const at::Tensor& lse,
                                      bool is_causal, double scale, double dropout_p, const OptionalTensor& seed,
                                      Needs needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::prefix_attention_backward");
  return op.call(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse, is_causal, scale, dropout_p, seed,
                 needs);
}

class PrefixAttentionFunction : public torch::autograd::Function<PrefixAttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& q, const Variable& k, const Variable& v,
                               const Variable& prefix_key, const Variable& prefix_value,
                               const OptionalTensor& attn_mask, bool is_causal, double scale, double dropout_p,
                               const OptionalTensor& seed) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, lse] =
        call_forward(q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed);
    ctx->save_for_backward(
        {q, k, v, prefix_key, prefix_value, attn_mask.value_or(at::Tensor()), out, lse, seed.value_or(at::Tensor())});
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    constexpr size_t kInputs = 10;
    variable_list result(kInputs);
    if (!grad_outputs[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    Needs needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
    const auto grads =
        call_backward(grad_outputs[0], saved[0], saved[1], saved[2], saved[3], saved[4], if_defined(saved[5]), saved[6],
                      saved[7], ctx->saved_data["is_causal"].toBool(), ctx->saved_data["scale"].toDouble(),
                      ctx->saved_data["dropout_p"].toDouble(), if_defined(saved[8]), needs);
    auto next = grads.begin();
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) result[i] = *next++;
    }
    return result;
  }
};

class PrefixAttentionBackwardFunction : public torch::autograd::Function<PrefixAttentionBackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_out, const Variable& q, const Variable& k,
                               const Variable& v, const Variable& prefix_key, const Variable& prefix_value,
                               const OptionalTensor& attn_mask, const Variable& out, const Variable& lse,
                               bool is_causal, double scale, double dropout_p, const OptionalTensor& seed,
                               Needs needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse, is_causal, scale, dropout_p,
                         seed, needs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "the gradients of prefix_attention have no derivative: double backward is not implemented");
  }
};

Result prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
                        const at::Tensor& prefix_value, const OptionalTensor& attn_mask, bool is_causal, double scale,
                        double dropout_p, const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(!any_requires_grad(attn_mask), "attn_mask requires grad, but gets none here: detach it first");
  check_no_tangent("prefix_attention", q, k, v, prefix_key, prefix_value, attn_mask);
  if (!any_requires_grad(q, k, v, prefix_key, prefix_value)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed);
  }
  const auto results =
      PrefixAttentionFunction::apply(q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed);
  return {results[0], results[1]};
}

std::vector<at::Tensor> prefix_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& prefix_key,
                                                  const at::Tensor& prefix_value, const OptionalTensor& attn_mask,
                                                  const at::Tensor& out, const at::Tensor& lse, bool is_causal,
                                                  double scale, double dropout_p, const OptionalTensor& seed,
                                                  Needs needs) {
  check_no_tangent("prefix_attention_backward", grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse);
  if (!any_requires_grad(grad_out, q, k, v, prefix_key, prefix_value)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse, is_causal, scale, dropout_p,
                         seed, needs);
  }
  return PrefixAttentionBackwardFunction::apply(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse,
                                                is_causal, scale, dropout_p, seed, needs);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

}  // namespace
}  // namespace peft_ext
