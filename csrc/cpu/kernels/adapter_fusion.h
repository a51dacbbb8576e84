// What the host hands to the fusion kernels: raw pointers and sizes.
//
//   weights[m, :] = softmax_i(scale q[m] . z_i[m])         mix[m] = sum_i weights[m, i] z_i[m]
//
//   dw_i = grad_mix . z_i + grad_weights_i                 grad_q   = sum_i ds_i z_i
//   ds_i = scale w_i (dw_i - sum_j w_j dw_j)               grad_z_i = w_i grad_mix + ds_i q
//
// Shapes    z_i [rows, columns] for each adapter, q [rows, columns] or one for all rows.
// Layout    Rows are contiguous; the z_i lie where they are, each with a row stride of its own.
// Types     All are of the storage type but weights and grad_weights, which are of the accumulation type (float;
//           double for float64); q and its gradient may be so too. All sums are formed in the accumulation type.
// Threads   A call serves a range of rows. A row of all z_i stays in the caches between its two readings, so
//           memory is read once.
#pragma once

#include <cstdint>

#include "isa.h"

namespace peft_ext {

struct FusionProblem {
  int64_t adapters;
  int64_t columns;
  double scale;
  const void* query;
  int64_t query_stride;
  bool one_query;   // For all rows; the stride is then 0.
  bool wide_query;  // q is of the accumulation type.
  const void* const* outputs;
  const int64_t* output_strides;
  void* weights;  // Row stride is adapters; the forward writes them, the backward reads them.
};

struct FusionGradients {
  const void* grad_mix;  // May be null, as if zero.
  int64_t grad_mix_stride;
  const void* grad_weights;   // May be null, as if zero; row stride is adapters.
  void* grad_query;           // May be null. With one query for all rows: the sum over the range's rows, accumulated
                              // in the accumulation type; otherwise one row each, row stride is columns.
  void* const* grad_outputs;  // Each may be null; row stride is columns.
};

struct FusionKernels {
  // Rows begin to end with `memory` as scratch; mix's row stride is columns.
  void (*forward)(const FusionProblem&, void* mix, int64_t begin, int64_t end, void* memory);
  void (*backward)(const FusionProblem&, const FusionGradients&, int64_t begin, int64_t end, void* memory);
};

// Bytes of scratch that a call needs.
inline int64_t fusion_workspace(int64_t adapters) {
  return adapters * static_cast<int64_t>(sizeof(void*) + sizeof(double));
}

}  // namespace peft_ext
