#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include "common/checks.h"

namespace peft_ext::cuda {

// a b, two matrices of one type, as it was accumulated: float32 for half precision.
inline at::Tensor mm_wide(const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType type = a.scalar_type(), acc = acc_type(type);
  return type == acc ? at::mm(a, b) : at::mm(a, b, acc);
}

inline void mm_wide_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType type = a.scalar_type(), acc = acc_type(type);
  type == acc ? at::mm_out(out, a, b) : at::mm_out(out, a, b, acc);
}

}  // namespace peft_ext::cuda
