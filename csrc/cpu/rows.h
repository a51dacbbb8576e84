// What the host code of row-wise ops shares: tensors as matrices of rows, and rows shared among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

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

// Shares tasks among as many threads as `workspace` has rows: task(begin, end, memory of the thread).
template <class Task>
void run_tasks(int64_t tasks, const at::Tensor& workspace, const Task& task) {
  auto* memory = static_cast<char*>(workspace.data_ptr());
  const int64_t stride = workspace.stride(0) * workspace.element_size();
  const int64_t threads = workspace.size(0);
  const int64_t share = (tasks + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      task(thread * share, std::min(tasks, (thread + 1) * share), memory + thread * stride);
    }
  });
}

// As run_tasks, for tasks of unequal size: task(its number, memory of the thread), by whichever thread is free.
template <class Task>
void run_unequal_tasks(int64_t tasks, const at::Tensor& workspace, const Task& task) {
  auto* memory = static_cast<char*>(workspace.data_ptr());
  const int64_t stride = workspace.stride(0) * workspace.element_size();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workspace.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < tasks; i = next++) task(i, memory + thread * stride);
    }
  });
}

}  // namespace peft_ext
