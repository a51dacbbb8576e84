#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>

namespace peft_ext::cuda {

// What every op sets up: the device of its tensors is the current one, and the products inside are of the types that
// they are called with, also under autocast.
class OpScope {
 public:
  explicit OpScope(const at::Tensor& tensor) : device_(tensor.device()), no_autocast_(c10::DispatchKey::AutocastCUDA) {}

 private:
  c10::cuda::CUDAGuard device_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

}  // namespace peft_ext::cuda
