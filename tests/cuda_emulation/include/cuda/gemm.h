// csrc/cuda/gemm.h by what the CPU has: products of a half precision that come as float32 exist on CUDA alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include "common/checks.h"

namespace peft_ext::cuda {

inline at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type());
  const at::ScalarType acc = acc_type(a.scalar_type());
  return at::mm(a.to(acc), b.to(acc));
}

inline void mm_wide_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  out.copy_(mm_wide(a, b));
}

}  // namespace peft_ext::cuda
