#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "common/lora_checks.h"
#include "cpu/lora_delta.h"

namespace peft_ext {
namespace {

std::tuple<at::Tensor, at::Tensor> lora_merge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               double scaling) {
  check_lora_merge(weight, lora_A, lora_B, scaling);
  const LoraDelta delta(weight, lora_A, lora_B, scaling);
  const at::Tensor matrix = physical_matrix(weight);
  const at::Tensor residual = at::empty(matrix.sizes(), matrix.options().dtype(at::kChar));
  const LoraMerge problem = delta.problem(matrix, residual);
  const auto& kernels = merge_kernels(weight.scalar_type());
  const int64_t rows = matrix.size(0), columns = matrix.size(1), element = matrix.element_size();
  const int64_t tasks = columns == 0 ? 0 : (rows + kMergeRowsPerTask - 1) / kMergeRowsPerTask;

  std::vector<std::vector<char>> found(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> memory(merge_workspace(columns)), row_outliers(columns * element);
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t row = task * kMergeRowsPerTask; row < std::min(rows, (task + 1) * kMergeRowsPerTask); ++row) {
        const int64_t count = kernels.merge(problem, row, row_outliers.data(), memory.data());
        found[task].insert(found[task].end(), row_outliers.begin(), row_outliers.begin() + count * element);
      }
    }
  });

  int64_t bytes = 0;
  for (const auto& part : found) bytes += static_cast<int64_t>(part.size());
  at::Tensor outliers = at::empty({bytes / element}, weight.options());
  auto* target = static_cast<char*>(outliers.data_ptr());
  for (const auto& part : found) {
    if (part.empty()) continue;
    std::memcpy(target, part.data(), part.size());
    target += part.size();
  }
  if (!matrix.is_alias_of(weight)) weight.copy_(matrix);
  if (!is_transposed(weight)) return {residual, outliers};
  if (outliers.numel() > 1) outliers = outliers.index_select(0, order_of_outliers(residual, outliers.numel()));
  return {residual.t(), outliers};
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("lora_merge_", lora_merge_);
}

}  // namespace
}  // namespace peft_ext
