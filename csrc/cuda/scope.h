#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>

#include "common/no_autocast.h"

namespace peft_ext::cuda {

// What every op sets up: the device of its tensors is the current one, and the products inside are of the types that
// they are called with, also under autocast.
class OpScope {
 public:
  explicit OpScope(const at::Tensor& tensor) : device_(tensor.device()) {}

 private:
  c10::cuda::CUDAGuard device_;
  NoAutocast no_autocast_;
};

}  // namespace peft_ext::cuda
