// The products of skinny.h for a handful of rows, where packing the factors would cost more than the arithmetic:
// the factors are read, and their gradient is written, where they lie.
//
//   dots          out [rows, outs]   = scale left [rows, inner] right [outs, inner]^T
//   narrow_update target [rows, cols] += left [rows, inner] right [cols, inner]^T, small inner
//   narrow_outer  target [cols, inner] = right [rows, cols]^T left [rows, inner], small inner
//
// The last two hold eight rows of the narrow factor, transposed, in registers. There are fewer than kLoraFewRows rows.
#pragma once

#include "lora_linear.h"
#include "transpose.h"
#include "vec.h"

namespace peft_ext {
namespace {

template <int kOuts, class C>
inline void dots_tile(C* out, const C* left, const C* right, int64_t inner, C scale) {
  Vec<C> sums[kOuts] = {};
  int64_t k = 0;
  for (; k + kLanes<C> <= inner; k += kLanes<C>) {
    const Vec<C> factor = load(left + k);
    for (int j = 0; j < kOuts; ++j) sums[j] += factor * load(right + j * inner + k);
  }
  for (int j = 0; j < kOuts; ++j) {
    C sum = sum_of_lanes(sums[j]);
    for (int64_t tail = k; tail < inner; ++tail) sum += left[tail] * right[j * inner + tail];
    out[j] = scale * sum;
  }
}

template <class C>
void dots(C* out, int64_t out_stride, const C* left, int64_t left_stride, int64_t rows, const C* right, int64_t outs,
          int64_t inner, C scale) {
  for (int64_t i = 0; i < rows; ++i) {
    int64_t j = 0;
    const auto advance = [&](auto tile) {
      constexpr int kOuts = decltype(tile)::value;
      dots_tile<kOuts>(out + i * out_stride + j, left + i * left_stride, right + j * inner, inner, scale);
      j += kOuts;
    };
    while (j + 8 <= outs) advance(Constant<8>{});
    if (j + 4 <= outs) advance(Constant<4>{});
    while (j < outs) advance(Constant<1>{});
  }
}

// Eight rows of `count` elements, as `count` columns; whole vectors only where all eight columns are there.
template <class C>
inline void load_columns(Eight<C> (&columns)[8], const C* source, int64_t stride, int64_t count) {
  if (count == 8) {
    for (int i = 0; i < 8; ++i) columns[i] = load_unaligned<Eight<C>>(source + i * stride);
    transpose_registers<C>(columns);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < 8; ++i) columns[j][i] = source[i * stride + j];
  }
}

template <class C>
inline void store_columns(Eight<C> (&columns)[8], C* target, int64_t stride, int64_t count) {
  if (count == 8) {
    transpose_registers<C>(columns);
    for (int i = 0; i < 8; ++i) std::memcpy(target + i * stride, &columns[i], sizeof(columns[i]));
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < 8; ++i) target[i * stride + j] = columns[j][i];
  }
}

template <class T>
inline Eight<Acc<T>> load_eight(const T* source) {
  Eight<Acc<T>> value;
  for (int lane = 0; lane < 8; ++lane) value[lane] = to_acc(source[lane]);
  return value;
}

template <class T>
inline void store_eight(T* target, Eight<Acc<T>> value) {
  for (int lane = 0; lane < 8; ++lane) target[lane] = from_acc<T>(value[lane]);
}

// The sums of eight vectors' lanes: in three rounds, half as many shuffles as transposing takes.
template <class C>
inline Eight<C> sums_of_lanes(const Eight<C> (&values)[8]) {
  Eight<C> pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shufflevector(values[2 * i], values[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
               __builtin_shufflevector(values[2 * i], values[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
  }
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// narrow_update of a single row, for whole vectors of the inner dimension: eight columns are eight dot products.
template <class T>
void narrow_update_row(T* target, int64_t columns, const Acc<T>* left, const Acc<T>* right, int64_t inner) {
  using C = Acc<T>;
  for (int64_t at = 0; at + 8 <= columns; at += 8) {
    Eight<C> products[8] = {};
    for (int64_t j = 0; j < inner; j += 8) {
      const auto factor = load_unaligned<Eight<C>>(left + j);
      for (int i = 0; i < 8; ++i) products[i] += factor * load_unaligned<Eight<C>>(right + (at + i) * inner + j);
    }
    store_eight(target + at, load_eight(target + at) + sums_of_lanes<C>(products));
  }
}

template <class T>
void narrow_update(T* target, int64_t target_stride, int64_t rows, int64_t columns, const Acc<T>* left,
                   int64_t left_stride, const Acc<T>* right, int64_t inner) {
  using C = Acc<T>;
  const bool by_row = rows == 1 && inner % 8 == 0;
  if (by_row) narrow_update_row(target, columns, left, right, inner);
  int64_t at = by_row ? columns / 8 * 8 : 0;
  for (; at + 8 <= columns; at += 8) {
    Eight<C> totals[kLoraFewRows];  // Rounded to T once.
    for (int64_t i = 0; i < rows; ++i) totals[i] = load_eight(target + i * target_stride + at);
    for (int64_t j = 0; j < inner; j += 8) {
      const int64_t count = inner - j < 8 ? inner - j : 8;
      Eight<C> factors[8];
      load_columns<C>(factors, right + at * inner + j, inner, count);
      for (int64_t i = 0; i < rows; ++i) {
        Eight<C> sum = {};
        for (int64_t c = 0; c < count; ++c) sum += left[i * left_stride + j + c] * factors[c];
        totals[i] += sum;
      }
    }
    for (int64_t i = 0; i < rows; ++i) store_eight(target + i * target_stride + at, totals[i]);
  }
  for (; at < columns; ++at) {
    for (int64_t i = 0; i < rows; ++i) {
      C sum = to_acc(target[i * target_stride + at]);
      for (int64_t j = 0; j < inner; ++j) sum += left[i * left_stride + j] * right[at * inner + j];
      target[i * target_stride + at] = from_acc<T>(sum);
    }
  }
}

template <class C>
void narrow_outer(C* target, const C* left, int64_t left_stride, int64_t inner, const C* right, int64_t right_stride,
                  int64_t rows, int64_t columns) {
  int64_t at = 0;
  for (; at + 8 <= columns; at += 8) {
    for (int64_t j = 0; j < inner; j += 8) {
      const int64_t count = inner - j < 8 ? inner - j : 8;
      Eight<C> sums[8] = {};
      for (int64_t i = 0; i < rows; ++i) {
        const auto values = load_unaligned<Eight<C>>(right + i * right_stride + at);
        for (int64_t c = 0; c < count; ++c) sums[c] += left[i * left_stride + j + c] * values;
      }
      store_columns<C>(sums, target + at * inner + j, inner, count);
    }
  }
  for (; at < columns; ++at) {
    for (int64_t j = 0; j < inner; ++j) {
      C sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += left[i * left_stride + j] * right[i * right_stride + at];
      target[at * inner + j] = sum;
    }
  }
}

}  // namespace
}  // namespace peft_ext
