// target [columns, rows] = scale source [rows, columns]^T, in tiles of 8 x 8 held in registers.
#pragma once

#include "vec.h"

namespace peft_ext {
namespace {

template <class C>
using Eight = typename VectorType<C, 8 * sizeof(C)>::type;

// Three rounds of interleaving rows i and i + 4 transpose eight rows of eight.
template <class C>
inline void transpose_tile(const C* source, int64_t source_stride, C* target, int64_t target_stride, C scale) {
  Eight<C> rows[8], mixed[8];
  for (int i = 0; i < 8; ++i) rows[i] = scale * load_unaligned<Eight<C>>(source + i * source_stride);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      mixed[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < 8; ++i) std::memcpy(target + i * target_stride, &rows[i], sizeof(rows[i]));
}

template <class C>
inline void transpose_by_element(const C* source, int64_t source_stride, int64_t rows, int64_t columns, C* target,
                                 int64_t target_stride, C scale) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) target[j * target_stride + i] = scale * source[i * source_stride + j];
  }
}

template <class C>
void transpose(const C* source, int64_t source_stride, int64_t rows, int64_t columns, C* target, int64_t target_stride,
               C scale) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t i = 0; i < whole_rows; i += 8) {
    for (int64_t j = 0; j < whole_columns; j += 8) {
      transpose_tile(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride,
                     scale);
    }
  }
  transpose_by_element(source + whole_columns, source_stride, whole_rows, columns - whole_columns,
                       target + whole_columns * target_stride, target_stride, scale);
  transpose_by_element(source + whole_rows * source_stride, source_stride, rows - whole_rows, columns,
                       target + whole_rows, target_stride, scale);
}

}  // namespace
}  // namespace peft_ext
