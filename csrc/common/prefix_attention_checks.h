// What prefix_attention accepts; peft_ext/reference/prefix_attention.py is the same in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace peft_ext {

void check_prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
                            const at::Tensor& prefix_value, const std::optional<at::Tensor>& attn_mask, double scale,
                            double dropout_p, const std::optional<at::Tensor>& seed);

// What the backward gets besides.
void check_prefix_attention_saved(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& out,
                                  const at::Tensor& lse);

}  // namespace peft_ext
