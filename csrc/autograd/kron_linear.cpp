#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Needs = std::array<bool, 5>;

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                        const OptionalTensor& bias, double scaling) {
  static const auto op = find_op<decltype(call_forward)>("peft_ext::kron_linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, A, B, t, bias, scaling);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                      const at::Tensor& B, const OptionalTensor& t, double scaling, Needs needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::kron_linear_backward");
  return op.call(grad_y, x, A, B, t, scaling, needs);
}

class KronLinear : public torch::autograd::Function<KronLinear> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const Variable& x, const Variable& A, const Variable& B,
                            const OptionalTensor& t, const OptionalTensor& bias, double scaling) {
    ctx->save_for_backward({x, A, B, t.value_or(at::Tensor())});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["bias"] = bias.has_value();
    return call_forward(x, A, B, t, bias, scaling);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    constexpr size_t kInputs = 6;
    const auto saved = ctx->get_saved_variables();
    const bool has_t = saved[3].defined(), has_bias = ctx->saved_data["bias"].toBool();
    // needs_input_grad counts the tensors that are there
    const Needs needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                         has_t && ctx->needs_input_grad(3), has_bias && ctx->needs_input_grad(has_t ? 4 : 3)};
    const auto grads = call_backward(grad_outputs[0], saved[0], saved[1], saved[2], if_defined(saved[3]),
                                     ctx->saved_data["scaling"].toDouble(), needs);
    variable_list result(kInputs);
    auto next = grads.begin();
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) result[i] = *next++;
    }
    return result;
  }
};

class KronLinearBackward : public torch::autograd::Function<KronLinearBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_y, const Variable& x, const Variable& A,
                               const Variable& B, const OptionalTensor& t, double scaling, Needs needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, A, B, t, scaling, needs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "the gradients of kron_linear have no derivative: double backward is not implemented");
  }
};

at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                       const OptionalTensor& bias, double scaling) {
  check_no_tangent("kron_linear", x, A, B, t, bias);
  if (!any_requires_grad(x, A, B, t, bias)) return call_forward(x, A, B, t, bias, scaling);
  return KronLinear::apply(x, A, B, t, bias, scaling);
}

std::vector<at::Tensor> kron_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                             const at::Tensor& B, const OptionalTensor& t, double scaling,
                                             Needs needs) {
  check_no_tangent("kron_linear_backward", grad_y, x, A, B, t);
  if (!any_requires_grad(grad_y, x, A, B, t)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, A, B, t, scaling, needs);
  }
  return KronLinearBackward::apply(grad_y, x, A, B, t, scaling, needs);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("kron_linear", kron_linear);
  m.impl("kron_linear_backward", kron_linear_backward);
}

}  // namespace
}  // namespace peft_ext
