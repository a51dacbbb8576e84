// The derivative of multi_lora_linear: that of lora_linear (autograd/lora_branch.h), with a gradient for the A and the
// B of each adapter, zero where no row uses it. Saved are the arguments as they are; rows are grouped and masks drawn
// again. W, the scalings and the index get no gradient. The gradients have no derivative of their own.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
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

class MultiLora : public torch::autograd::Function<MultiLora> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const Variable& x, const OptionalTensor& bias, at::TensorList lora_A,
                            at::TensorList lora_B, const Variable& weight, const Variable& scalings,
                            const Variable& index, const OptionalTensor& seed, const OptionalTensor& weight_scale,
                            at::ArrayRef<double> dropout_p) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved = {
        x, weight, scalings, index, seed.value_or(at::Tensor()), weight_scale.value_or(at::Tensor())};
    saved.reserve(kFactors + 2 * lora_A.size());
    saved.insert(saved.end(), lora_A.begin(), lora_A.end());
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["dropout_p"] = dropout_p.vec();
    return call_forward(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    constexpr size_t kX = 0, kBias = 1, kLists = 2, kOthers = 6;  // Where forward has them; after the lists, others.
    const auto saved = ctx->get_saved_variables();
    const size_t adapters = (saved.size() - kFactors) / 2;
    const at::TensorList factors = at::TensorList(saved).slice(kFactors);
    const at::TensorList lora_A = factors.slice(0, adapters), lora_B = factors.slice(adapters);

    size_t edge = 0;  // needs_input_grad counts the tensors that are there.
    const bool needs_x = ctx->needs_input_grad(edge++);
    const bool needs_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(edge++);
    Flags needs_A, needs_B;
    for (size_t i = 0; i < adapters; ++i) needs_A.push_back(ctx->needs_input_grad(edge++));
    for (size_t i = 0; i < adapters; ++i) needs_B.push_back(ctx->needs_input_grad(edge++));

    const auto grads = call_backward(grad_outputs[0], saved[0], saved[1], lora_A, lora_B, saved[2], saved[3],
                                     ctx->saved_data["dropout_p"].toDoubleVector(), if_defined(saved[4]), needs_x,
                                     needs_bias, needs_A, needs_B, if_defined(saved[5]));
    variable_list result(kLists + 2 * adapters + kOthers);
    auto next = grads.begin();
    if (needs_x) result[kX] = *next++;
    if (needs_bias) result[kBias] = *next++;
    for (size_t i = 0; i < adapters; ++i) {
      if (needs_A[i]) result[kLists + i] = *next++;
    }
    for (size_t i = 0; i < adapters; ++i) {
      if (needs_B[i]) result[kLists + adapters + i] = *next++;
    }
    return result;
  }

 private:
  static constexpr size_t kFactors = 6;  // Where the saved A begin, after which come the B.
};

class MultiLoraBackward : public torch::autograd::Function<MultiLoraBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_y, const Variable& x, const Variable& weight,
                               at::TensorList lora_A, at::TensorList lora_B, const Variable& scalings,
                               const Variable& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                               bool needs_x, bool needs_bias, const Flags& needs_A, const Flags& needs_B,
                               const OptionalTensor& weight_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, weight, lora_A, lora_B, scalings, index, dropout_p, seed, needs_x, needs_bias,
                         needs_A, needs_B, weight_scale);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "the gradients of multi_lora_linear have no derivative: double backward is not implemented");
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
  if (!any_requires_grad(x, bias, lora_A, lora_B)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  }
  return MultiLora::apply(x, bias, lora_A, lora_B, weight, scalings, index, seed, weight_scale, dropout_p);
}

std::vector<at::Tensor> multi_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                   const at::Tensor& weight, at::TensorList lora_A,
                                                   at::TensorList lora_B, const at::Tensor& scalings,
                                                   const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                                   const OptionalTensor& seed, bool needs_x, bool needs_bias,
                                                   const Flags& needs_A, const Flags& needs_B,
                                                   const OptionalTensor& weight_scale) {
  check_no_tangent("multi_lora_linear_backward", grad_y, x, weight, lora_A, lora_B, scalings, weight_scale);
  if (!any_requires_grad(grad_y, x, lora_A, lora_B)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, weight, lora_A, lora_B, scalings, index, dropout_p, seed, needs_x, needs_bias,
                         needs_A, needs_B, weight_scale);
  }
  return MultiLoraBackward::apply(grad_y, x, weight, lora_A, lora_B, scalings, index, dropout_p, seed, needs_x,
                                  needs_bias, needs_A, needs_B, weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext
