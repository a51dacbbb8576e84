// What the host hands to the kernels of quantized_linear: raw pointers and sizes.
//
//   w[n,k] = scale[n, k / group] value[n,k]
//   dequantize   a block of w in the storage type
//   product      y[m,n] = sum_k x[m,k] w[n,k] + bias[n], for the few rows of a decoding step
//
// Shapes    values [rows, columns], int8, or 4 bits a value; scale [rows, groups]; x, y [few, columns], [few, rows].
// Layout    Rows are contiguous. Of 4-bit values, each block of 32 columns is 16 bytes: byte j holds column j in its
// low
//           half and column j + 16 in its high half, both plus 8. A group is all columns, or a multiple of 32 of them.
// Types     w is rounded to the storage type once by dequantize, and stays float in product, which sums in float and
//           rounds y once. There is no product for float64.
// Work      product reads the values once, which is what its time goes into; the host splits their rows over threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace peft_ext {

// Of how many rows of x at most the product is worth more than dequantizing a panel of the weight for a matrix product.
constexpr int64_t kQuantizedFewRows = 32;
// x is zero from `columns` up to the next multiple of this: the widest vector.
constexpr int64_t kQuantizedPadding = 16;
constexpr int64_t kPackedBlock = 32;

struct QuantizedWeight {
  const void* values;
  bool packed;  // 4 bits a value.
  int64_t columns;
  const float* scale;
  int64_t groups;
};

// Rows and columns [begin, end); of packed values, columns are multiples of kPackedBlock.
struct WeightBlock {
  int64_t row_begin, row_end, column_begin, column_end;
  void* target;
  int64_t target_stride;
};

struct QuantizedProduct {
  QuantizedWeight weight;
  int64_t few;
  const float* x;  // Padded.
  int64_t x_stride;
  const float* bias;  // Or null.
  void* y;
  int64_t y_stride;
};

struct QuantizedKernels {
  void (*dequantize)(const QuantizedWeight&, const WeightBlock&);
  void (*product)(const QuantizedProduct&, int64_t row_begin, int64_t row_end);
};

}  // namespace peft_ext
