#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "common/checks.h"
#include "cpu/kernels/lora_linear.h"

namespace peft_ext {

// The input of a problem that serves `rows` of the rows of x.
inline void set_input(LoraProblem& problem, const at::Tensor& x, int64_t rows, int64_t out_features) {
  problem.few_rows = rows < kLoraFewRows;
  problem.block = std::min(lora_block_rows(x.size(1), out_features), rows);
  problem.widen = acc_type(x.scalar_type()) != x.scalar_type();
  problem.in_features = x.size(1);
  problem.out_features = out_features;
  problem.x = x.const_data_ptr();
  problem.x_stride = x.stride(0);
}

}  // namespace peft_ext
