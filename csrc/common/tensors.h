// Tensors as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/checks.h"

namespace peft_ext {

// [..., features] as [rows, features] whose rows are contiguous, without a copy where the strides allow.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  if (tensor.dim() == 2 && tensor.stride(1) == 1) return tensor;
  const int64_t features = tensor.size(-1);
  int64_t rows = 1;
  for (const int64_t size : tensor.sizes().slice(0, tensor.dim() - 1)) rows *= size;
  const at::Tensor matrix = tensor.reshape({rows, features});
  return features <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// [rows, features] with the leading sizes of `like`.
inline at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  if (like.dim() == 2) return rows;
  return rows.view(with_last_size(like.sizes(), rows.size(1)));
}

inline at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

inline at::Tensor undefined_or(const std::optional<at::Tensor>& tensor, at::ScalarType type) {
  return tensor ? as_type(*tensor, type).contiguous() : at::Tensor();
}

inline const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline bool has_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1;
}

// With contiguous features; a copy only where it must be.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return has_contiguous_rows(tensor) ? tensor : tensor.contiguous();
}

}  // namespace peft_ext
