// Merging is an edit of the frozen weight, not a step of a computation: it has no derivative, whatever requires
// grad, and a weight that requires grad cannot be edited under autograd (as with torch's own in-place ops).
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

std::tuple<at::Tensor, at::Tensor> call(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                        double scaling) {
  static const auto op = find_op<decltype(call)>("peft_ext::lora_merge_");
  return op.call(weight, lora_A, lora_B, scaling);
}

std::tuple<at::Tensor, at::Tensor> lora_merge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               double scaling) {
  check_frozen(weight);
  check_no_tangent("lora_merge_", weight, lora_A, lora_B);
  at::AutoDispatchBelowAutograd below;
  return call(weight, lora_A, lora_B, scaling);
}

// Inference mode passes over Autograd, but not over this.
std::tuple<at::Tensor, at::Tensor> bump_and_merge(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                                  double scaling) {
  // First, since it throws for an inference tensor outside inference mode.
  torch::autograd::impl::bump_version(weight);
  at::AutoDispatchBelowADInplaceOrView below;
  return call(weight, lora_A, lora_B, scaling);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("lora_merge_", lora_merge_);
}

TORCH_LIBRARY_IMPL(peft_ext, ADInplaceOrView, m) {
  m.impl("lora_merge_", bump_and_merge);
}

}  // namespace
}  // namespace peft_ext
