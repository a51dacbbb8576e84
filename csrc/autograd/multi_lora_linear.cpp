// The derivative of multi_lora_linear: that of lora_linear (autograd/lora_branch.h), with a gradient for the A and the
// B of each adapter, zero where no row uses it. Saved are the arguments as they are; rows are grouped and masks drawn
// again. W, the scalings and the index get no gradient. The gradients have no derivative of their own.
#include <torch/library.h>

#include "autograd/node.h"

namespace peft_ext {
namespace {

using Flags = c10::List<bool>;

at::Tensor multi_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                             at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                             const at::Tensor& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                             const OptionalTensor& weight_scale);

std::vector<at::Tensor> multi_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                   const at::Tensor& weight, at::TensorList lora_A,
                                                   at::TensorList lora_B, const at::Tensor& scalings,
                                                   const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                                   const OptionalTensor& seed, bool needs_x, bool needs_bias,
                                                   const Flags& needs_A, const Flags& needs_B,
                                                   const OptionalTensor& weight_scale);

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                        const at::Tensor& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                        const OptionalTensor& weight_scale) {
  static const auto op = find_op<decltype(multi_lora_linear)>("peft_ext::multi_lora_linear");
  return op.call(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                                      const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                      const OptionalTensor& seed, bool needs_x, bool needs_bias, const Flags& needs_A,
                                      const Flags& needs_B, const OptionalTensor& weight_scale) {
  static const auto op = find_op<decltype(multi_lora_linear_backward)>("peft_ext::multi_lora_linear_backward");
  return op.call(grad_y, x, weight, lora_A, lora_B, scalings, index, dropout_p, seed, needs_x, needs_bias, needs_A,
                 needs_B, weight_scale);
}

struct MultiLora {
  static constexpr const char* kName = "MultiLoraLinearBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                const std::vector<double>& dropout_p) {
    constexpr size_t kLists = 2;    // The edges are x, bias, each A and each B.
    constexpr size_t kFactors = 6;  // Where the saved A begin, after which come the B.
    const size_t adapters = (saved.size() - kFactors) / 2;
    const at::TensorList factors = at::TensorList(saved).slice(kFactors);
    Flags needs_A, needs_B;
    for (size_t i = 0; i < adapters; ++i) {
      needs_A.push_back(needs[kLists + i]);
      needs_B.push_back(needs[kLists + adapters + i]);
    }
    return spread(call_backward(grads[0], saved[0], saved[1], factors.slice(0, adapters), factors.slice(adapters),
                                saved[2], saved[3], dropout_p, if_defined(saved[4]), needs[0], needs[1], needs_A,
                                needs_B, if_defined(saved[5])),
                  needs);
  }
};

at::Tensor multi_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                             at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                             const at::Tensor& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                             const OptionalTensor& weight_scale) {
  check_frozen(weight);
  check_constant("scalings", scalings);
  if (weight_scale) check_constant("weight_scale", *weight_scale);
  check_no_tangent("multi_lora_linear", x, weight, bias, lora_A, lora_B, scalings, weight_scale);
  const at::Tensor y = below_autograd(
      [&] { return call_forward(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale); });
  if (any_requires_grad(x, bias, lora_A, lora_B)) {
    variable_list saved = {x, weight, scalings, index, or_undefined(seed), or_undefined(weight_scale)};
    saved.insert(saved.end(), lora_A.begin(), lora_A.end());
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    record<MultiLora>({y}, collect_next_edges(x, bias, lora_A, lora_B), saved, dropout_p.vec());
  }
  return y;
}

std::vector<at::Tensor> multi_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                   const at::Tensor& weight, at::TensorList lora_A,
                                                   at::TensorList lora_B, const at::Tensor& scalings,
                                                   const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                                   const OptionalTensor& seed, bool needs_x, bool needs_bias,
                                                   const Flags& needs_A, const Flags& needs_B,
                                                   const OptionalTensor& weight_scale) {
  const auto call = [&] {
    return call_backward(grad_y, x, weight, lora_A, lora_B, scalings, index, dropout_p, seed, needs_x, needs_bias,
                         needs_A, needs_B, weight_scale);
  };
  return without_derivative("multi_lora_linear_backward", call, grad_y, x, weight, lora_A, lora_B, scalings,
                            weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext
