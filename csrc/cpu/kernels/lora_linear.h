// What the host hands to the LoRA kernels: raw pointers and sizes.
//
//   forward   y      += s drop(x) A^T B^T
//   backward  grad_A += s (grad_y B)^T drop(x),  grad_B^T += s (drop(x) A^T)^T grad_y,
//             grad_x += mask . s (grad_y B) A / (1 - p)
//
// Shapes    x, grad_x [rows, in_features]; y, grad_y [rows, out_features]; A [ranks, in_features].
//           The output may be cut into slices, each with its own range of A's rows and its own B:
//           slice i is lora_B_t [rank, columns] on the output columns [column, column + columns).
// Layout    rows are contiguous, with a row stride; x, y and their gradients are of the storage type,
//           everything else of the accumulation type (float; double for float64 storage).
// Work      a call serves the rows [begin, end), in blocks that stay in the second-level cache: x and
//           grad_y are read once from memory. The host splits the rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace peft_ext {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // round(65536 p): 0 keeps everything, 65536 nothing.
  double scale = 1.0;      // 65536 / (65536 - threshold), or 0.
};

struct LoraSlice {
  int64_t column;      // First output column.
  int64_t columns;     // How many.
  int64_t first_rank;  // First row of A.
  int64_t rank;        // How many.
  const void* lora_B_t;
};

struct LoraProblem {
  int64_t in_features;
  int64_t out_features;
  int64_t ranks;  // Rows of A.
  const void* lora_A;
  const LoraSlice* slices;
  int64_t num_slices;
  double scaling;
  Dropout dropout;
  const void* x;
  int64_t x_stride;
};

struct LoraForward : LoraProblem {
  void* y;
  int64_t y_stride;
};

struct LoraBackward : LoraProblem {
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_x;  // Null where it is not to be updated.
  int64_t grad_x_stride;
  bool needs_A;
  bool needs_B;
};

// target = source + left right: [rows, columns] += [rows, inner] [inner, columns].
struct LowRankSum {
  const void* source;
  int64_t source_stride;
  void* target;
  int64_t target_stride;
  int64_t columns;
  const void* left;
  int64_t left_row_stride;
  int64_t left_inner_stride;
  const void* right;  // Row stride is columns.
  int64_t inner;
};

struct LoraKernels {
  void (*forward)(const LoraForward&, int64_t begin, int64_t end, void* workspace);
  // grad_A [ranks, in_features] and grad_B_t (the slices' one after the other) are added to.
  void (*backward)(const LoraBackward&, int64_t begin, int64_t end, void* grad_A, void* grad_B_t, void* workspace);
  void (*low_rank_sum)(const LowRankSum&, int64_t begin, int64_t end);
};

// Rows of a block: at least a register tile, at most what fits the second-level cache.
inline int64_t lora_block_rows(int64_t in_features, int64_t out_features) {
  constexpr int64_t kElements = 128 * 1024;
  return std::clamp<int64_t>(kElements / std::max<int64_t>(in_features + out_features, 1), 4, 64);
}

// Accumulation-type elements of workspace that one call of forward or backward needs.
inline int64_t lora_workspace(const LoraProblem& problem) {
  constexpr int64_t kMaskPadding = 64;
  const int64_t row = 2 * problem.in_features + problem.out_features + 2 * problem.ranks + kMaskPadding;
  return lora_block_rows(problem.in_features, problem.out_features) * row;
}

}  // namespace peft_ext
