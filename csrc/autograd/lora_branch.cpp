#include "autograd/lora_branch.h"

#include "autograd/node.h"

namespace peft_ext {
namespace {

using Flags = c10::List<bool>;

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
                                      double scaling, double dropout_p, const OptionalTensor& seed,
                                      std::array<bool, 4> needs, const OptionalTensor& weight_scale) {
  if (enable_lora.empty()) {
    static const auto op = find_op<std::vector<at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double,
        const OptionalTensor&, std::array<bool, 4>, const OptionalTensor&)>("peft_ext::lora_linear_backward");
    return op.call(grad_y, x, weight, lora_A, lora_B, scaling, dropout_p, seed, needs, weight_scale);
  }
  static const auto op = find_op<std::vector<at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Flags&,
      double, double, const OptionalTensor&, std::array<bool, 4>, const OptionalTensor&)>(
      "peft_ext::merged_lora_linear_backward");
  return op.call(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs, weight_scale);
}

struct LoraBranch {
  static constexpr const char* kName = "LoraBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                const Flags& enable_lora, double scaling, double dropout_p) {
    return spread(call_backward(grads[0], saved[0], saved[1], saved[2], saved[3], enable_lora, scaling, dropout_p,
                                if_defined(saved[4]), as_array<4>(needs), if_defined(saved[5])),
                  needs);
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
  const at::Tensor y = below_autograd([&] {
    return call_forward(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  });
  if (any_requires_grad(x, bias, lora_A, lora_B)) {
    record<LoraBranch>({y}, collect_next_edges(x, bias, lora_A, lora_B),
                       {x, weight, lora_A, lora_B, or_undefined(seed), or_undefined(weight_scale)}, enable_lora,
                       scaling, dropout_p);
  }
  return y;
}

std::vector<at::Tensor> lora_backward_autograd(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               const Flags& enable_lora, double scaling, double dropout_p,
                                               const OptionalTensor& seed, std::array<bool, 4> needs,
                                               const OptionalTensor& weight_scale) {
  const auto call = [&] {
    return call_backward(grad_y, x, weight, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, needs, weight_scale);
  };
  return without_derivative(enable_lora.empty() ? "lora_linear_backward" : "merged_lora_linear_backward", call, grad_y,
                            x, weight, lora_A, lora_B, weight_scale);
}

}  // namespace peft_ext
