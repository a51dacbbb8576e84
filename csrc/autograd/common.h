// What the derivatives of all ops share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <optional>

#include "common/find_op.h"

namespace peft_ext {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline at::Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(at::Tensor());
}

// Runs `call`, whose ops pass over the Autograd key.
template <class Call>
auto below_autograd(const Call& call) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call();
}

// Whether `test` holds for a tensor, for one that is there, or for one of a list.
template <class Test>
bool any_of(const Test& test, const at::Tensor& tensor) {
  return tensor.defined() && test(tensor);
}
template <class Test>
bool any_of(const Test& test, const OptionalTensor& tensor) {
  return tensor && any_of(test, *tensor);
}
template <class Test>
bool any_of(const Test& test, at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), test);
}

template <class... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  return at::GradMode::is_enabled() && (any_of(requires_grad, tensors) || ...);
}

// The ops have no forward-mode derivative: without this, a tangent would be dropped without a word.
template <class... Tensors>
void check_no_tangent(const char* op, const Tensors&... tensors) {
  const auto has_tangent = [](const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); };
  TORCH_CHECK_NOT_IMPLEMENTED(!(any_of(has_tangent, tensors) || ...), op,
                              " has no forward-mode derivative: it is not implemented");
}

// The base weight is frozen: no op gives it a gradient.
inline void check_frozen(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(!any_requires_grad(weight),
                    "weight requires grad, but is frozen here: call weight.requires_grad_(False) first");
}

// Nor does every other argument have one.
inline void check_constant(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(!any_requires_grad(tensor), name, " requires grad, but gets no gradient: pass ", name, ".detach()");
}

}  // namespace peft_ext
