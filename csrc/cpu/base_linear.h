// The frozen layer on the CPU, where at::linear writes the bias into y in a pass as slow as a fifth of a small product.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "common/checks.h"

namespace peft_ext {

// y += left right.
inline void add_product(const at::Tensor& y, const at::Tensor& left, const at::Tensor& right) {
  at::Tensor target = y;
  at::addmm_out(target, y, left, right);
}

// rows W^T + bias.
inline at::Tensor base_linear(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  constexpr int64_t kGrain = 32 * 1024;
  const at::ScalarType type = rows.scalar_type();
  if (!bias || acc_type(type) != type) return at::linear(rows, weight, bias);
  const at::Tensor y = at::empty({rows.size(0), weight.size(0)}, rows.options()), source = bias->contiguous();
  const int64_t row_bytes = source.numel() * source.element_size();
  auto* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, rows.size(0), kGrain / std::max<int64_t>(source.numel(), 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * row_bytes, source.const_data_ptr(), row_bytes);
  });
  add_product(y, rows, weight.t());
  return y;
}

}  // namespace peft_ext
