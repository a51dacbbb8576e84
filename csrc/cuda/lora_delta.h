// The update D = s B A on the device, shared by lora_merge_ and lora_unmerge_. Formulas, the meaning of the residual
// and the order of the outliers: cpu/kernels/lora_merge_.h.
//
// D is summed rank by rank in the accumulation type by fused multiply-adds, one thread an element: merge and unmerge
// see the same bits, those of a transposed weight too, as a product does not depend on the order of its factors.
#pragma once

#include <ATen/core/Tensor.h>

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

template <class C>
__device__ inline C delta_at(const DeltaProblem& p, int64_t row, int64_t column) {
  const C* left = static_cast<const C*>(p.left) + row * p.left_row_stride;
  const C* right = static_cast<const C*>(p.right) + column;
  C delta = 0;
  for (int64_t j = 0; j < p.inner; ++j) delta = fma(left[j * p.left_inner_stride], right[j * p.columns], delta);
  return delta;
}

constexpr int kDeltaThreads = 256;

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

  // Runs kernel(problem) with a thread an element.
  void run(void (*kernel)(DeltaProblem), const at::Tensor& residual) const {
    if (matrix.numel() == 0) return;
    const DeltaProblem problem{
        matrix.data_ptr(), matrix.stride(0), matrix.size(0),         matrix.size(1), left.const_data_ptr(),
        left.stride(0),    left.stride(1),   right.const_data_ptr(), left.size(1),   residual.data_ptr<int8_t>()};
    const int64_t column_blocks = blocks_for(matrix.size(1), kDeltaThreads);
    launch(kernel, dim3(grid_size(matrix.size(0)), grid_size(column_blocks, 65535)), dim3(kDeltaThreads), 0, problem);
  }

  bool transposed;
  at::Tensor matrix;       // The weight's memory, or a copy where neither its rows nor its columns are contiguous.
  at::Tensor left, right;  // [rows, rank], [rank, columns]
};

}  // namespace peft_ext::cuda
