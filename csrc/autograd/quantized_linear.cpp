// The derivative of quantized_linear: grad_x = grad_y W and the sum of grad_y's rows for the bias. The weight is
// frozen. Both products are linear in their input, so each is the derivative of the other, to any order.
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "autograd/node.h"

namespace peft_ext {
namespace {

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptionalTensor& bias);
at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale);

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                        const OptionalTensor& bias) {
  static const auto op = find_op<decltype(quantized_linear)>("peft_ext::quantized_linear");
  return op.call(x, weight, weight_scale, bias);
}

at::Tensor call_backward(const at::Tensor& grad_y, const at::Tensor& weight, const at::Tensor& weight_scale) {
  static const auto op = find_op<decltype(quantized_linear_backward)>("peft_ext::quantized_linear_backward");
  return op.call(grad_y, weight, weight_scale);
}

// Without a reshape, which a DTensor of uneven shards has none of.
at::Tensor sum_of_rows(const at::Tensor& grad_y) {
  std::vector<int64_t> leading(grad_y.dim() - 1);
  std::iota(leading.begin(), leading.end(), 0);
  return leading.empty() ? grad_y : grad_y.sum(leading);
}

struct QuantizedLinear {
  static constexpr const char* kName = "QuantizedLinearBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs) {
    const at::Tensor& grad_y = grads[0];
    variable_list result(2);
    if (needs[0]) result[0] = call_backward(grad_y, saved[0], saved[1]);
    if (needs[1]) result[1] = sum_of_rows(grad_y);
    return result;
  }
};

struct QuantizedLinearBackward {
  static constexpr const char* kName = "QuantizedLinearBackwardBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs&) {
    return {call_forward(grads[0], saved[0], saved[1], std::nullopt)};
  }
};

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptionalTensor& bias) {
  check_no_tangent("quantized_linear", x, weight, weight_scale, bias);
  check_constant("weight_scale", weight_scale);
  const at::Tensor y = below_autograd([&] { return call_forward(x, weight, weight_scale, bias); });
  if (any_requires_grad(x, bias)) record<QuantizedLinear>({y}, collect_next_edges(x, bias), {weight, weight_scale});
  return y;
}

at::Tensor quantized_linear_backward(const at::Tensor& grad_y, const at::Tensor& weight,
                                     const at::Tensor& weight_scale) {
  check_no_tangent("quantized_linear_backward", grad_y, weight, weight_scale);
  const at::Tensor grad_x = below_autograd([&] { return call_backward(grad_y, weight, weight_scale); });
  if (any_requires_grad(grad_y)) {
    record<QuantizedLinearBackward>({grad_x}, collect_next_edges(grad_y), {weight, weight_scale});
  }
  return grad_x;
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("quantized_linear", quantized_linear);
  m.impl("quantized_linear_backward", quantized_linear_backward);
}

}  // namespace
}  // namespace peft_ext
