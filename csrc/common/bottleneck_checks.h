// What bottleneck_adapter accepts; peft_ext/reference/bottleneck_adapter.py has the same for the reference.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>

#include "common/activation.h"

namespace peft_ext {

// The tensors of one adapter; the norm's are both there or both not.
struct BottleneckTensors {
  const at::Tensor& down_weight;
  const std::optional<at::Tensor>& down_bias;
  const at::Tensor& up_weight;
  const std::optional<at::Tensor>& up_bias;
  const std::optional<at::Tensor>& norm_weight;
  const std::optional<at::Tensor>& norm_bias;
};

// One of the names that check_bottleneck accepts.
Activation activation_of(c10::string_view name);

void check_bottleneck(const at::Tensor& x, const BottleneckTensors& adapter, c10::string_view activation,
                      c10::string_view norm, double scaling, double eps);

// What the backward gets besides, for an adapter of `width` hidden features.
void check_bottleneck_saved(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& hidden, int64_t width);

}  // namespace peft_ext
