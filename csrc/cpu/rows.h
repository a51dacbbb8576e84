// What the host code of row-wise ops shares: rows shared among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

#include "common/tensors.h"

namespace peft_ext {

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
