#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "common/lora_checks.h"
#include "cpu/lora_delta.h"

namespace peft_ext {
namespace {

// Where each task's outliers begin; the last entry is their number.
std::vector<int64_t> first_outliers(const at::Tensor& residual, int64_t tasks) {
  const auto* data = residual.const_data_ptr<int8_t>();
  const int64_t rows = residual.size(0), columns = residual.size(1);
  std::vector<int64_t> first(tasks + 1, 0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int8_t* row = data + task * kMergeRowsPerTask * columns;
      const int64_t count = (std::min(rows, (task + 1) * kMergeRowsPerTask) - task * kMergeRowsPerTask) * columns;
      first[task + 1] = std::count(row, row + count, kOutlier);
    }
  });
  for (int64_t task = 0; task < tasks; ++task) first[task + 1] += first[task];
  return first;
}

// In the order in which the kernels come to them.
at::Tensor outliers_of_rows(const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& outliers) {
  if (!is_transposed(weight) || outliers.numel() <= 1) return outliers.contiguous();
  return at::empty_like(outliers).index_copy_(0, order_of_outliers(residual, outliers.numel()), outliers);
}

void lora_unmerge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                   const at::Tensor& outliers, double scaling) {
  check_lora_merge(weight, lora_A, lora_B, scaling);
  check_residual(weight, residual, outliers);
  const LoraDelta delta(weight, lora_A, lora_B, scaling);
  const at::Tensor matrix = physical_matrix(weight);
  const at::Tensor distances = (is_transposed(weight) ? residual.t() : residual).contiguous();
  const int64_t rows = matrix.size(0), columns = matrix.size(1), element = matrix.element_size();
  const int64_t tasks = columns == 0 ? 0 : (rows + kMergeRowsPerTask - 1) / kMergeRowsPerTask;
  const std::vector<int64_t> first = first_outliers(distances, tasks);
  TORCH_CHECK_VALUE(outliers.numel() == first.back(), "outliers must have the ", first.back(),
                    " elements that residual marks, but has ", outliers.numel());

  const LoraMerge problem = delta.problem(matrix, distances);
  const auto& kernels = merge_kernels(weight.scalar_type());
  const at::Tensor kept = outliers_of_rows(weight, distances, outliers);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> memory(merge_workspace(columns));
    for (int64_t task = begin; task < end; ++task) {
      const auto* next = static_cast<const char*>(kept.const_data_ptr()) + first[task] * element;
      for (int64_t row = task * kMergeRowsPerTask; row < std::min(rows, (task + 1) * kMergeRowsPerTask); ++row) {
        next += kernels.unmerge(problem, row, next, memory.data()) * element;
      }
    }
  });
  if (!matrix.is_alias_of(weight)) weight.copy_(matrix);
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("lora_unmerge_", lora_unmerge_);
}

}  // namespace
}  // namespace peft_ext
