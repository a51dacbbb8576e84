// What the checks of several ops share. Each message names the argument, what it got and what it wants;
// TORCH_CHECK_VALUE and TORCH_CHECK_TYPE reach Python as ValueError and TypeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace peft_ext {

// float32, float64, bfloat16 or float16.
bool is_supported(at::ScalarType type);

// What values of `type` are computed and summed in.
inline at::ScalarType acc_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// `sizes` but for the last.
std::vector<int64_t> with_last_size(at::IntArrayRef sizes, int64_t last);

// What a backward gets, a gradient or a saved result, against what it must be.
void check_saved(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
                 at::Device device);

// A probability, and a seed on `device` where it is not 0.
void check_dropout(double dropout_p, const std::optional<at::Tensor>& seed, at::Device device);

}  // namespace peft_ext
