// The derivative of bottleneck_adapter. Saved are its arguments and what the activation takes: the backward computes
// norm and activation anew. The gradients have no derivative of their own: asking for one is an error.
#include <torch/library.h>

#include <array>
#include <vector>

#include "autograd/node.h"

namespace peft_ext {
namespace {

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
                                      double eps, std::array<bool, 7> needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::bottleneck_adapter_backward");
  return op.call(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation,
                 norm, residual, scaling, eps, needs);
}

struct BottleneckAdapter {
  static constexpr const char* kName = "BottleneckAdapterBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                const std::string& activation, const std::string& norm, bool residual, double scaling,
                                double eps) {
    return spread(call_backward(grads[0], saved[0], saved[7], saved[1], if_defined(saved[2]), saved[3],
                                if_defined(saved[4]), if_defined(saved[5]), if_defined(saved[6]), activation, norm,
                                residual, scaling, eps, as_array<7>(needs)),
                  needs);
  }
};

Result bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight, const OptionalTensor& down_bias,
                          const at::Tensor& up_weight, const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                          const OptionalTensor& norm_bias, c10::string_view activation, c10::string_view norm,
                          bool residual, double scaling, double eps, bool keep_hidden) {
  check_no_tangent("bottleneck_adapter", x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias);
  const bool has_derivative = any_requires_grad(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias);
  const auto [y, hidden] = below_autograd([&] {
    return call_forward(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm,
                        residual, scaling, eps, keep_hidden || has_derivative);
  });
  if (has_derivative) {
    record<BottleneckAdapter>({y},
                              collect_next_edges(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias),
                              {x, down_weight, or_undefined(down_bias), up_weight, or_undefined(up_bias),
                               or_undefined(norm_weight), or_undefined(norm_bias), hidden},
                              std::string(activation), std::string(norm), residual, scaling, eps);
  }
  return {y, hidden};
}

std::vector<at::Tensor> bottleneck_adapter_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& hidden, const at::Tensor& down_weight,
                                                    const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                    const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                    const OptionalTensor& norm_bias, c10::string_view activation,
                                                    c10::string_view norm, bool residual, double scaling, double eps,
                                                    std::array<bool, 7> needs) {
  const auto call = [&] {
    return call_backward(grad_y, x, hidden, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
                         activation, norm, residual, scaling, eps, needs);
  };
  return without_derivative("bottleneck_adapter_backward", call, grad_y, x, hidden, down_weight, down_bias, up_weight,
                            up_bias, norm_weight, norm_bias);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext
