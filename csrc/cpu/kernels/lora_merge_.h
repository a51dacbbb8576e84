// What the host hands to the merge kernels: raw pointers and sizes.
//
//   merge     W' = round(W + D),  D = left right;  keeps what round(W' - D) misses of W
//   unmerge   W  = round(W' - D), corrected
//
// Shapes    W [rows, columns], left [rows, inner], right [inner, columns]; W in its storage type, D in the
//           accumulation type (float; double for float64).
// Residual  int8 [rows, columns]: the distance in units in the last place from round(W' - D) to W, or kOutlier
//           where it does not fit or is no number; those weights are kept whole, row by row.
// Exactness D is summed in a fixed order, so that both directions see the same bits, those of W's transpose too.
#pragma once

#include <cstdint>

#include "isa.h"

namespace peft_ext {

constexpr int8_t kOutlier = -128;

struct LoraMerge {
  void* weight;
  int64_t row_stride;
  int64_t columns;
  const void* left;
  int64_t left_row_stride;
  int64_t left_inner_stride;
  const void* right;  // Row stride is columns.
  int64_t inner;
  int8_t* residual;  // Row stride is columns.
};

struct MergeKernels {
  // Both serve one row with `memory` as scratch, and return the number of its outliers: merge writes them to
  // `outliers` (room for a row), unmerge reads them from there.
  int64_t (*merge)(const LoraMerge&, int64_t row, void* outliers, void* memory);
  int64_t (*unmerge)(const LoraMerge&, int64_t row, const void* outliers, void* memory);
};

// Bytes of scratch that a row needs.
inline int64_t merge_workspace(int64_t columns) {
  return 3 * columns * static_cast<int64_t>(sizeof(double));
}

}  // namespace peft_ext
