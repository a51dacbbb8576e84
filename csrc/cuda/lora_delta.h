// The update D = s B A on the device, shared by lora_merge_ and lora_unmerge_. Formulas, the meaning of the residual
// and the order of the outliers: cpu/kernels/lora_merge_.h.
//
// D is summed rank by rank in the accumulation type by fused multiply-adds: merge and unmerge see the same bits, those
// of a transposed weight too, as a product does not depend on the order of its factors. A thread takes eight neighbours
// of four rows, so that what it reads of the factors serves several elements.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {

constexpr int8_t kOutlier = -128;

// The weight as its memory lies, W [rows, columns] with contiguous rows; left [rows, inner], right [inner, columns].
struct DeltaProblem {
  void* weight;
  int64_t row_stride, rows, columns;
  const void* left;
  int64_t left_row_stride, left_inner_stride;
  const void* right;
  int64_t inner;
  int8_t* residual;  // Row stride is columns.
  bool by_vectors;   // Whether eight neighbours of the weight, of right and of the residual can be read at once.
};

// The signed integer of T's width.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;

// Sign-magnitude bits of a float to integers in the floats' order, and back: a bijection.
template <class I>
__device__ inline I flip_negative(I bits) {
  constexpr I kMagnitude = static_cast<I>(~(std::make_unsigned_t<I>(1) << (8 * sizeof(I) - 1)));
  return bits < 0 ? static_cast<I>(bits ^ kMagnitude) : bits;
}

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr int kDeltaThreads = 256, kDeltaRows = 4, kDeltaColumns = 8;

enum class Writes { kWeight, kResidual };

// Eight neighbours, or `count` of them.
template <bool kWhole, class T>
__device__ inline void load_neighbours(T (&target)[kDeltaColumns], const T* source, int64_t count) {
  if constexpr (kWhole) {
    load_whole(target, source);
  } else {
    load_elements(target, source, count, false);
  }
}

// Calls change(weight, delta, residual) for the elements of a thread from `column` on, and writes what it made of the
// weight or of the residual.
template <bool kWhole, class T, Writes kWrites, bool kReadsResidual, class Change>
__device__ inline void change_tile(const DeltaProblem& p, int64_t first_row, int64_t column, const Change& change) {
  using C = Acc<T>;
  const int64_t count = p.columns - column;
  C delta[kDeltaRows][kDeltaColumns] = {};
#pragma unroll 4
  for (int64_t j = 0; j < p.inner; ++j) {
    C right[kDeltaColumns], left[kDeltaRows];
    load_neighbours<kWhole>(right, static_cast<const C*>(p.right) + j * p.columns + column, count);
#pragma unroll
    for (int i = 0; i < kDeltaRows; ++i) {
      const int64_t row = min(first_row + i, p.rows - 1);
      left[i] = static_cast<const C*>(p.left)[row * p.left_row_stride + j * p.left_inner_stride];
    }
#pragma unroll
    for (int i = 0; i < kDeltaRows; ++i) {
#pragma unroll
      for (int c = 0; c < kDeltaColumns; ++c) delta[i][c] = fma(left[i], right[c], delta[i][c]);
    }
  }
  T weight[kDeltaRows][kDeltaColumns];
  int8_t residual[kDeltaRows][kDeltaColumns] = {};
#pragma unroll
  for (int i = 0; i < kDeltaRows; ++i) {
    const int64_t row = min(first_row + i, p.rows - 1);
    load_neighbours<kWhole>(weight[i], static_cast<const T*>(p.weight) + row * p.row_stride + column, count);
    if constexpr (kReadsResidual) load_neighbours<kWhole>(residual[i], p.residual + row * p.columns + column, count);
  }
#pragma unroll
  for (int i = 0; i < kDeltaRows; ++i) {
    const int64_t row = first_row + i;
    if (row >= p.rows) break;
#pragma unroll
    for (int c = 0; c < kDeltaColumns; ++c) change(weight[i][c], delta[i][c], residual[i][c]);
    if constexpr (kWrites == Writes::kWeight) {
      store_elements(static_cast<T*>(p.weight) + row * p.row_stride + column, weight[i], count, kWhole);
    } else {
      store_elements(p.residual + row * p.columns + column, residual[i], count, kWhole);
    }
  }
}

// change_tile for all elements; the residual is read where the weight is written and `kReadsResidual`.
template <class T, Writes kWrites, bool kReadsResidual, class Change>
__device__ inline void for_each_element(const DeltaProblem& p, const Change& change) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kDeltaRows;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kDeltaColumns;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kDeltaColumns;
       column < p.columns; column += step) {
    if (p.by_vectors) {
      change_tile<true, T, kWrites, kReadsResidual>(p, first_row, column, change);
    } else {
      change_tile<false, T, kWrites, kReadsResidual>(p, first_row, column, change);
    }
  }
}

inline bool is_transposed(const at::Tensor& weight) {
  return weight.stride(0) == 1 && weight.stride(1) != 1;
}

struct LoraDelta {
  LoraDelta(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling)
      : transposed(is_transposed(weight)),
        matrix(transposed              ? weight.t()
               : weight.stride(1) == 1 ? weight
                                       : weight.contiguous()) {
    const auto type = acc_type(weight.scalar_type());
    const at::Tensor a = lora_A.to(type), b = lora_B.to(type).mul(scaling);
    left = transposed ? a.t() : b;
    right = (transposed ? b.t() : a).contiguous();
  }

  void run(void (*kernel)(DeltaProblem), const at::Tensor& residual) const {
    if (matrix.numel() == 0) return;
    const int64_t rows = matrix.size(0), columns = matrix.size(1);
    const DeltaProblem problem{matrix.data_ptr(),
                               matrix.stride(0),
                               rows,
                               columns,
                               left.const_data_ptr(),
                               left.stride(0),
                               left.stride(1),
                               right.const_data_ptr(),
                               left.size(1),
                               residual.data_ptr<int8_t>(),
                               columns % kDeltaColumns == 0 && is_aligned(matrix, matrix.stride(0), kDeltaColumns) &&
                                   is_aligned(right, columns, kDeltaColumns) &&
                                   is_aligned(residual, columns, kDeltaColumns)};
    const int64_t groups = blocks_for(columns, kDeltaColumns);
    const int64_t threads = std::min<int64_t>(blocks_for(groups, kWarp) * kWarp, kDeltaThreads);
    const dim3 grid(grid_size(blocks_for(rows, kDeltaRows)), grid_size(blocks_for(groups, threads), 65535));
    launch(kernel, grid, dim3(static_cast<unsigned>(threads)), 0, problem);
  }

  bool transposed;
  at::Tensor matrix;       // The weight's memory, or a copy where neither its rows nor its columns are contiguous.
  at::Tensor left, right;  // [rows, rank], [rank, columns]
};

}  // namespace peft_ext::cuda
