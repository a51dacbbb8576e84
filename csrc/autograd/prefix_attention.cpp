// The derivative of prefix_attention, for q, k, v, prefix_key and prefix_value. Saved are the arguments, the result
// and the log-sum-exp of each query: probabilities are formed again, and the dropout mask is drawn again from its seed.
#include <torch/library.h>

#include <array>

#include "autograd/node.h"

namespace peft_ext {
namespace {

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
                                      std::array<bool, 5> needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::prefix_attention_backward");
  return op.call(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse, is_causal, scale, dropout_p, seed,
                 needs);
}

struct PrefixAttention {
  static constexpr const char* kName = "PrefixAttentionBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                bool is_causal, double scale, double dropout_p) {
    return spread(
        call_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], if_defined(saved[5]), saved[6],
                      saved[7], is_causal, scale, dropout_p, if_defined(saved[8]), as_array<5>(needs)),
        needs);
  }
};

Result prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
                        const at::Tensor& prefix_value, const OptionalTensor& attn_mask, bool is_causal, double scale,
                        double dropout_p, const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(!any_requires_grad(attn_mask), "attn_mask requires grad, but gets none here: detach it first");
  check_no_tangent("prefix_attention", q, k, v, prefix_key, prefix_value, attn_mask);
  const auto [out, lse] = below_autograd(
      [&] { return call_forward(q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed); });
  if (any_requires_grad(q, k, v, prefix_key, prefix_value)) {
    record<PrefixAttention>({out}, collect_next_edges(q, k, v, prefix_key, prefix_value),
                            {q, k, v, prefix_key, prefix_value, or_undefined(attn_mask), out, lse, or_undefined(seed)},
                            is_causal, scale, dropout_p);
  }
  return {out, lse};
}

std::vector<at::Tensor> prefix_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& prefix_key,
                                                  const at::Tensor& prefix_value, const OptionalTensor& attn_mask,
                                                  const at::Tensor& out, const at::Tensor& lse, bool is_causal,
                                                  double scale, double dropout_p, const OptionalTensor& seed,
                                                  std::array<bool, 5> needs) {
  const auto call = [&] {
    return call_backward(grad_out, q, k, v, prefix_key, prefix_value, attn_mask, out, lse, is_causal, scale, dropout_p,
                         seed, needs);
  };
  return without_derivative("prefix_attention_backward", call, grad_out, q, k, v, prefix_key, prefix_value, attn_mask,
                            out, lse);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("prefix_attention", prefix_attention);
  m.impl("prefix_attention_backward", prefix_attention_backward);
}

}  // namespace
}  // namespace peft_ext
