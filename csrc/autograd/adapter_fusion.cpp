// The derivative of adapter_fusion. With q' = q K the folded query, the backward op gives those of q' and of the
// outputs, and from there
//
//   grad_q = grad_q' K^T        grad_K = q^T grad_q'        grad_b = 0
//
// The last exactly: q . b is the same for all adapters, and the softmax does not see it. Saved are the arguments, q'
// and the weights, neither keys nor stacked outputs.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "autograd/node.h"
#include "common/no_autocast.h"

namespace peft_ext {
namespace {

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

// a K^T; of a vector by mv, since matmul squeezes its result in place, which DTensor gets wrong.
at::Tensor unfolded(const at::Tensor& a, const at::Tensor& key_weight) {
  return a.dim() == 1 ? at::mv(key_weight, a) : at::matmul(a, key_weight.t());
}

// Summed over all rows.
at::Tensor outer_product(const at::Tensor& a, const at::Tensor& b) {
  return a.dim() == 1 ? at::outer(a, b) : at::mm(a.flatten(0, -2).t(), b.flatten(0, -2));
}

struct AdapterFusion {
  static constexpr const char* kName = "AdapterFusionBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                double scale) {
    const NoAutocast products_keep_their_types;
    constexpr size_t kQuery = 0, kWeight = 1, kBias = 2, kOutputs = 3;  // The edges.
    const auto &query = saved[0], &key_weight = saved[1], &key_bias = saved[2], &folded_query = saved[3],
               &weights = saved[4];
    const auto outputs = at::TensorList(saved).slice(5);
    const bool needs_folded = needs[kQuery] || needs[kWeight];
    c10::List<bool> needs_outputs;
    for (size_t i = 0; i < outputs.size(); ++i) needs_outputs.push_back(needs[kOutputs + i]);

    const auto found = call_backward(if_defined(grads[0]), if_defined(grads[1]), folded_query, outputs, weights, scale,
                                     needs_folded, needs_outputs);
    variable_list result(needs.size());
    auto next = found.begin();
    if (needs_folded) {
      const at::Tensor& grad_folded = *next++;
      if (needs[kQuery]) result[kQuery] = key_weight.defined() ? unfolded(grad_folded, key_weight) : grad_folded;
      if (needs[kWeight]) result[kWeight] = outer_product(query, grad_folded);
    }
    if (needs[kBias]) result[kBias] = at::zeros_like(key_bias);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (needs_outputs[i]) result[kOutputs + i] = *next++;
    }
    return result;
  }
};

Result adapter_fusion(const at::Tensor& query, at::TensorList outputs, const OptionalTensor& key_weight,
                      const OptionalTensor& key_bias, double scale) {
  check_no_tangent("adapter_fusion", query, outputs, key_weight, key_bias);
  const auto [mix, weights, folded_query] =
      below_autograd([&] { return call_forward(query, outputs, key_weight, key_bias, scale); });
  if (any_requires_grad(query, outputs, key_weight, key_bias)) {
    variable_list saved = {query, or_undefined(key_weight), or_undefined(key_bias), key_weight ? folded_query : query,
                           weights};
    saved.insert(saved.end(), outputs.begin(), outputs.end());
    record<AdapterFusion>({mix, weights}, collect_next_edges(query, key_weight, key_bias, outputs), saved, scale);
  }
  return {mix, weights, folded_query};
}

std::vector<at::Tensor> adapter_fusion_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                                const at::Tensor& folded_query, at::TensorList outputs,
                                                const at::Tensor& weights, double scale, bool needs_query,
                                                const c10::List<bool>& needs_outputs) {
  const auto call = [&] {
    return call_backward(grad_mix, grad_weights, folded_query, outputs, weights, scale, needs_query, needs_outputs);
  };
  return without_derivative("adapter_fusion_backward", call, grad_mix, grad_weights, folded_query, outputs, weights);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("adapter_fusion", adapter_fusion);
  m.impl("adapter_fusion_backward", adapter_fusion_backward);
}

}  // namespace
}  // namespace peft_ext
