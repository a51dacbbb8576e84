// Merging is an edit of the frozen weight, not a step of a computation: it has no derivative, whatever requires
// grad, and a weight that requires grad cannot be edited under autograd (as with torch's own in-place ops).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/frozen.h"

namespace peft_ext {
namespace {

std::tuple<at::Tensor, at::Tensor> lora_merge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               double scaling) {
  check_frozen(weight);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("peft_ext::lora_merge_", "").typed<decltype(lora_merge_)>();
  at::AutoDispatchBelowADInplaceOrView below;
  auto result = op.call(weight, lora_A, lora_B, scaling);
  torch::autograd::impl::bump_version(weight);
  return result;
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("lora_merge_", lora_merge_);
}

}  // namespace
}  // namespace peft_ext
