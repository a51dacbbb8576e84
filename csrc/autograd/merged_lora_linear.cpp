#include <torch/library.h>

#include "autograd/lora_branch.h"

namespace peft_ext {
namespace {

TORCH_LIBRARY_IMPL(peft_ext, Autograd, m) {
  m.impl("merged_lora_linear", lora_autograd);
  m.impl("merged_lora_linear_backward", lora_backward_autograd);
}

}  // namespace
}  // namespace peft_ext
