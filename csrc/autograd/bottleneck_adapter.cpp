// The derivative of bottleneck_adapter. Saved are its arguments and what the activation takes: the backward computes
// norm and activation anew. The gradients have no derivative of their own: asking for one is an error.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
constexpr size_t kTensors = 7, kInputs = 12;
using Needs = std::array<bool, kTensors>;
using Result = std::tuple<at::Tensor, at::Tensor>;

Result call_forward(const at::Tensor& x, const at::Tensor& down_weight, const OptionalTensor& down_bias,
                    const at::Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                    const OptionalTensor& norm_bias, c10::string_view activation, c10::string_view norm, bool residual,
                    double scaling, double eps, bool keep_hidden) {
  static const auto op = find_op<decltype(call_forward)>("peft_ext::bottleneck_adapter");
  return op.call(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm, residual,
                 scaling, eps, keep_hidden);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& hidden,
                                      const at::Tensor& down_weight, const OptionalTensor& down_bias,
                                      const at::Tensor& up_weight, const OptionalTensor& up_bias,
                                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                      c10::string_view activation, c10::string_view norm, bool residual, double scaling,
                                      double eps, Needs needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::bottleneck_adapter_backward");
  return op.call(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation,
                 norm, residual, scaling, eps, needs);
}

class BottleneckAdapter : public torch::autograd::Function<BottleneckAdapter> {
 public:
  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& down_weight,
                               const OptionalTensor& down_bias, const Variable& up_weight,
                               const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const std::string& activation, const std::string& norm,
                               bool residual, double scaling, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [y, hidden] = call_forward(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                                          activation, norm, residual, scaling, eps, true);
    const at::Tensor none;
    ctx->save_for_backward({x, down_weight, down_bias.value_or(none), up_weight, up_bias.value_or(none),
                            norm_weight.value_or(none), norm_bias.value_or(none), hidden});
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["norm"] = norm;
    ctx->saved_data["residual"] = residual;
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({hidden});
    ctx->set_materialize_grads(false);
    return {y, hidden};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list result(kInputs);
    if (!grad_outputs[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    Needs needs{};
    // needs_input_grad counts only the tensors that are there.
    for (size_t i = 0, next = 0; i < kTensors; ++i) {
      if (saved[i].defined()) needs[i] = ctx->needs_input_grad(next++);
    }
    const std::string activation = ctx->saved_data["activation"].toStringRef(),
                      norm = ctx->saved_data["norm"].toStringRef();
    const auto grads = call_backward(grad_outputs[0], saved[0], saved[7], saved[1], if_defined(saved[2]), saved[3],
                                     if_defined(saved[4]), if_defined(saved[5]), if_defined(saved[6]), activation, norm,
                                     ctx->saved_data["residual"].toBool(), ctx->saved_data["scaling"].toDouble(),
                                     ctx->saved_data["eps"].toDouble(), needs);
    auto next = grads.begin();
    for (size_t i = 0; i < kTensors; ++i) {
      if (needs[i]) result[i] = *next++;
    }
    return result;
  }
};

class BottleneckAdapterBackward : public torch::autograd::Function<BottleneckAdapterBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_y, const Variable& x, const Variable& hidden,
                               const Variable& down_weight, const OptionalTensor& down_bias, const Variable& up_weight,
                               const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                               const OptionalTensor& norm_bias, const std::string& activation, const std::string& norm,
                               bool residual, double scaling, double eps, Needs needs) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                         activation, norm, residual, scaling, eps, needs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "the gradients of bottleneck_adapter have no derivative: "
                                "double backward is not implemented");
  }
};

Result bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight, const OptionalTensor& down_bias,
                          const at::Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                          const OptionalTensor& norm_bias, c10::string_view activation, c10::string_view norm,
                          bool residual, double scaling, double eps, bool keep_hidden) {
  check_no_tangent("bottleneck_adapter", x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias);
  if (!any_requires_grad(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm,
                        residual, scaling, eps, keep_hidden);
  }
  const auto results = BottleneckAdapter::apply(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                                                std::string(activation), std::string(norm), residual, scaling, eps);
  return {results[0], results[1]};
}

std::vector<at::Tensor> bottleneck_adapter_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& hidden, const at::Tensor& down_weight,
                                                    const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                    const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                    const OptionalTensor& norm_bias, c10::string_view activation,
                                                    c10::string_view norm, bool residual, double scaling, double eps,
                                                    Needs needs) {
  check_no_tangent("bottleneck_adapter_backward", grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias,
                   norm_weight, norm_bias);
  if (!any_requires_grad(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                         activation, norm, residual, scaling, eps, needs);
  }
  return BottleneckAdapterBackward::apply(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight,
                                          norm_bias, std::string(activation), std::string(norm), residual, scaling, eps,
                                          needs);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext
