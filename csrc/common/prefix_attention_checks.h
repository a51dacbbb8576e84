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

// The result lies as the heads' outputs are wanted next: [batch, queries, heads, dim].
at::Tensor make_output(const at::Tensor& q);

}  // namespace peft_ext
