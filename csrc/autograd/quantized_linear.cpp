// The derivative of quantized_linear: grad_x = grad_y W and the sum of grad_y's rows for the bias. The weight is
// frozen. Both products are linear in their input, so each is the derivative of the other, to any order.
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptionalTensor& bias);
at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale);

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                        const OptionalTensor& bias) {
  static const auto op = find_op<decltype(quantized_linear)>("peft_ext::quantized_linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, weight_scale, bias);
}

at::Tensor call_backward(const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& weight_scale) {
  static const auto op = find_op<decltype(quantized_linear_backward)>("peft_ext::quantized_linear_backward");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(grad_y, weight, weight_scale);
}

class QuantizedLinear : public torch::autograd::Function<QuantizedLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const Variable& x, const OptionalTensor& bias, const Variable& weight,
                            const Variable& weight_scale) {
    ctx->save_for_backward({weight, weight_scale});
    ctx->saved_data["bias"] = bias.has_value();
    return call_forward(x, weight, weight_scale, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& grad_y = grad_outputs[0];
    variable_list grads(4);
    if (ctx->needs_input_grad(0)) grads[0] = quantized_linear_backward(grad_y, saved[0], saved[1]);
    // needs_input_grad counts the tensors that are there
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(1)) {
      grads[1] = grad_y.reshape({-1, grad_y.size(-1)}).sum(0);
    }
    return grads;
  }
};

class QuantizedLinearBackward : public torch::autograd::Function<QuantizedLinearBackward> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const Variable& grad_y, const Variable& weight,
                            const Variable& weight_scale) {
    ctx->save_for_backward({weight, weight_scale});
    return call_backward(grad_y, weight, weight_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    return {quantized_linear(grad_outputs[0], saved[0], saved[1], std::nullopt), {}, {}};
  }
};

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptionalTensor& bias) {
  check_no_tangent("quantized_linear", x, weight, weight_scale, bias);
  check_constant("weight_scale", weight_scale);
  if (!any_requires_grad(x, bias)) return call_forward(x, weight, weight_scale, bias);
  return QuantizedLinear::apply(x, bias, weight, weight_scale);
}

at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale) {
  check_no_tangent("quantized_linear_backward", grad_y, weight, weight_scale);
  if (!any_requires_grad(grad_y)) return call_backward(grad_y, weight, weight_scale);
  return QuantizedLinearBackward::apply(grad_y, weight, weight_scale);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("quantized_linear", quantized_linear);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace
}  // namespace peft_ext
