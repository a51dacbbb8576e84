#include "autograd/lora_branch.h"

#include <torch/csrc/autograd/custom_function.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Flags = c10::List<bool>;
using Needs = std::array<bool, 4>;

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, const Flags& enable_lora, double scaling,
                        double dropout_p, const OptionalTensor& seed, const OptionalTensor& weight_scale) {
  if (enable_lora.empty()) {
    static const auto op =
        find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                           const at::Tensor&, double, double, const OptionalTensor&, const OptionalTensor&)>(
            "peft_ext::lora_linear");
    return op.call(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, weight_scale);
  }
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const Flags&,
      double, double, const OptionalTensor&, const OptionalTensor&)>("peft_ext::merged_lora_linear");
  return op.call(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B, const Flags& enable_lora,
                                      double scaling, double dropout_p, const OptionalTensor& seed, Needs needs,
                                      const OptionalTensor& weight_scale) {
  if (enable_lora.empty()) {
    static const auto op = find_op<std::vector<at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double,
        const OptionalTensor&, Needs, const OptionalTensor&)>("peft_ext::lora_linear_backward");
    return op.call(grad_y, x, weight, lora_A, lora_B, scaling, dropout_p, seed, needs, weight_scale);
  }
  static const auto op = find_op<std::vector<at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Flags&,
      double, double, const OptionalTensor&, Needs, const OptionalTensor&)>("peft_ext::merged_lora_linear_backward");
  return op.call(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs, weight_scale);
}

class LoraBranch : public torch::autograd::Function<LoraBranch> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const Variable& x, const Variable& lora_A, const Variable& lora_B,
                            const OptionalTensor& bias, const Variable& weight, const OptionalTensor& seed,
                            const OptionalTensor& weight_scale, const Flags& enable_lora, double scaling,
                            double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(
        {x, lora_A, lora_B, weight, seed.value_or(at::Tensor()), weight_scale.value_or(at::Tensor())});
    ctx->saved_data["enable_lora"] = enable_lora;
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    return call_forward(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    // Where forward has them. needs_input_grad counts tensors that are there: without a bias, 3 is the weight,
    // which needs none.
    constexpr size_t kX = 0, kA = 1, kB = 2, kBias = 3, kInputs = 10;
    const auto saved = ctx->get_saved_variables();
    const Needs needs = {ctx->needs_input_grad(kX), ctx->needs_input_grad(kBias), ctx->needs_input_grad(kA),
                         ctx->needs_input_grad(kB)};
    const auto grads =
        call_backward(grad_outputs[0], saved[0], saved[3], saved[1], saved[2],
                      ctx->saved_data["enable_lora"].toBoolList(), ctx->saved_data["scaling"].toDouble(),
                      ctx->saved_data["dropout_p"].toDouble(), if_defined(saved[4]), needs, if_defined(saved[5]));
    variable_list result(kInputs);
    constexpr size_t kOrder[] = {kX, kBias, kA, kB};
    auto next = grads.begin();
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) result[kOrder[i]] = *next++;
    }
    return result;
  }
};

class LoraBranchBackward : public torch::autograd::Function<LoraBranchBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_y, const Variable& x, const Variable& weight,
                               const Variable& lora_A, const Variable& lora_B, const Flags& enable_lora, double scaling,
                               double dropout_p, const OptionalTensor& seed, Needs needs,
                               const OptionalTensor& weight_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs, weight_scale);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "the gradients of lora_linear and merged_lora_linear have no derivative: "
                                "double backward is not implemented");
  }
};

}  // namespace

at::Tensor lora_autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const at::Tensor& lora_A, const at::Tensor& lora_B, const Flags& enable_lora, double scaling,
                         double dropout_p, const OptionalTensor& seed, const OptionalTensor& weight_scale) {
  check_frozen(weight);
  if (weight_scale) check_constant("weight_scale", *weight_scale);
  check_no_tangent(enable_lora.empty() ? "lora_linear" : "merged_lora_linear", x, weight, bias, lora_A, lora_B,
                   weight_scale);
  if (!any_requires_grad(x, bias, lora_A, lora_B)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  }
  return LoraBranch::apply(x, lora_A, lora_B, bias, weight, seed, weight_scale, enable_lora, scaling, dropout_p);
}

std::vector<at::Tensor> lora_backward_autograd(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               const Flags& enable_lora, double scaling, double dropout_p,
                                               const OptionalTensor& seed, Needs needs,
                                               const OptionalTensor& weight_scale) {
  check_no_tangent(enable_lora.empty() ? "lora_linear_backward" : "merged_lora_linear_backward", grad_y, x, weight,
                   lora_A, lora_B, weight_scale);
  if (!any_requires_grad(grad_y, x, lora_A, lora_B)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs, weight_scale);
  }
  return LoraBranchBackward::apply(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs,
                                   weight_scale);
}

}  // namespace peft_ext
