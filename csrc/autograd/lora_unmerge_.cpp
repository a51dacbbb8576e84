// No derivative, as lora_merge_.
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace peft_ext {
namespace {

void call(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
          const at::Tensor& outliers, double scaling) {
  static const auto op = find_op<decltype(call)>("peft_ext::lora_unmerge_");
  op.call(weight, lora_A, lora_B, residual, outliers, scaling);
}

void lora_unmerge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                   const at::Tensor& outliers, double scaling) {
  check_frozen(weight);
  check_no_tangent("lora_unmerge_", weight, lora_A, lora_B, outliers);
  at::AutoDispatchBelowAutograd below;
  call(weight, lora_A, lora_B, residual, outliers, scaling);
}

// As bump_and_merge in lora_merge_.cpp.
void bump_and_unmerge(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                      const at::Tensor& outliers, double scaling) {
  torch::autograd::impl::bump_version(weight);
  at::AutoDispatchBelowADInplaceOrView below;
  call(weight, lora_A, lora_B, residual, outliers, scaling);
}

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("lora_unmerge_", lora_unmerge_);
}

TORCH_LIBRARY_IMPL(peft_ext, ADInplaceOrView, m) {
  m.impl("lora_unmerge_", bump_and_unmerge);
}

}  // namespace
}  // namespace peft_ext
