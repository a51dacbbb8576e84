#include <torch/library.h>

#include "autograd/node.h"

namespace peft_ext {
namespace {

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                        const OptionalTensor& bias, double scaling) {
  static const auto op = find_op<decltype(call_forward)>("peft_ext::kron_linear");
  return op.call(x, A, B, t, bias, scaling);
}

std::vector<at::Tensor> call_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                      const at::Tensor& B, const OptionalTensor& t, double scaling,
                                      std::array<bool, 5> needs) {
  static const auto op = find_op<decltype(call_backward)>("peft_ext::kron_linear_backward");
  return op.call(grad_y, x, A, B, t, scaling, needs);
}

struct KronLinear {
  static constexpr const char* kName = "KronLinearBackward";
  static variable_list backward(const variable_list& grads, const variable_list& saved, const Needs& needs,
                                double scaling) {
    return spread(
        call_backward(grads[0], saved[0], saved[1], saved[2], if_defined(saved[3]), scaling, as_array<5>(needs)),
        needs);
  }
};

at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                       const OptionalTensor& bias, double scaling) {
  check_no_tangent("kron_linear", x, A, B, t, bias);
  const at::Tensor y = below_autograd([&] { return call_forward(x, A, B, t, bias, scaling); });
  if (any_requires_grad(x, A, B, t, bias)) {
    record<KronLinear>({y}, collect_next_edges(x, A, B, t, bias), {x, A, B, or_undefined(t)}, scaling);
  }
  return y;
}

std::vector<at::Tensor> kron_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                             const at::Tensor& B, const OptionalTensor& t, double scaling,
                                             std::array<bool, 5> needs) {
  const auto call = [&] { return call_backward(grad_y, x, A, B, t, scaling, needs); };
  return without_derivative("kron_linear_backward", call, grad_y, x, A, B, t);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("kron_linear", kron_linear);
  m.impl("kron_linear_backward", kron_linear_backward);
}

}  // namespace
}  // namespace peft_ext
