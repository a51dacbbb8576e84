// No derivative, as lora_merge_.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/frozen.h"

namespace peft_ext {
namespace {

void lora_unmerge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                   const at::Tensor& outliers, double scaling) {
  check_frozen(weight);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("peft_ext::lora_unmerge_", "").typed<decltype(lora_unmerge_)>();
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(weight, lora_A, lora_B, residual, outliers, scaling);
  torch::autograd::impl::bump_version(weight);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("lora_unmerge_", lora_unmerge_);
}

}  // namespace
}  // namespace peft_ext
