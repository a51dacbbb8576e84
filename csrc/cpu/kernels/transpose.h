// target [columns, rows] = source [rows, columns]^T, in tiles of up to 8 x 8 held in registers.
#pragma once

#include "vec.h"

namespace peft_ext {
namespace {

template <class C>
using Eight = typename VectorType<C, 8 * sizeof(C)>::type;

// Three rounds of interleaving rows i and i + 4.
template <class C>
inline void transpose_registers(Eight<C> (&rows)[8]) {
  Eight<C> mixed[8];
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      mixed[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) rows[i] = mixed[i];
  }
}

// Eight columns of kRows rows.
template <int kRows, class C>
inline void transpose_tile(const C* source, int64_t source_stride, C* target, int64_t target_stride) {
  Eight<C> rows[8] = {};
  for (int i = 0; i < kRows; ++i) rows[i] = load_unaligned<Eight<C>>(source + i * source_stride);
  transpose_registers<C>(rows);
  for (int i = 0; i < 8; ++i) std::memcpy(target + i * target_stride, &rows[i], kRows * sizeof(C));
}

template <int kRows, class C>
inline void transpose_rows(const C* source, int64_t source_stride, int64_t columns, C* target, int64_t target_stride) {
  int64_t j = 0;
  for (; j + 8 <= columns; j += 8) {
    transpose_tile<kRows>(source + j, source_stride, target + j * target_stride, target_stride);
  }
  for (; j < columns; ++j) {
    for (int i = 0; i < kRows; ++i) target[j * target_stride + i] = source[i * source_stride + j];
  }
}

template <class C>
void transpose_panel(const C* source, int64_t source_stride, int64_t rows, int64_t columns, C* target,
                     int64_t target_stride) {
  int64_t i = 0;
  const auto advance = [&](auto tile) {
    constexpr int kRows = decltype(tile)::value;
    transpose_rows<kRows>(source + i * source_stride, source_stride, columns, target + i, target_stride);
    i += kRows;
  };
  while (i + 8 <= rows) advance(Constant<8>{});
  if (i + 4 <= rows) advance(Constant<4>{});
  while (i < rows) advance(Constant<1>{});
}

// Along the longer side first: eight lines at a time stay in the cache also where a power of two between them maps
// them to one set.
template <class C>
void transpose(const C* source, int64_t source_stride, int64_t rows, int64_t columns, C* target,
               int64_t target_stride) {
  const int64_t panel = rows > columns ? 8 : columns;
  for (int64_t j = 0; j < columns; j += panel) {
    transpose_panel(source + j, source_stride, rows, j + panel < columns ? panel : columns - j,
                    target + j * target_stride, target_stride);
  }
}

}  // namespace
}  // namespace peft_ext
