// The two shapes of product that low-rank adapters are made of, where a GEMM library spends more on
// packing than on arithmetic. Both accumulate in registers.
//
//   dot_products   out [rows, outs]      = scale * left [rows, inner] . right [outs, inner]^T
//   rank_update    target [rows, cols]   = source + mask . left [rows, inner] right [inner, cols]
#pragma once

#include "dropout.h"
#include "vec.h"

namespace peft_ext {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 3, kDotOuts = 8;           // 24 of 32 registers accumulate.
constexpr int kUpdateRows = 4, kUpdateVectors = 4;  // 16, and 4 hold a row of the right factor.
#else
constexpr int kDotRows = 3, kDotOuts = 4;
constexpr int kUpdateRows = 4, kUpdateVectors = 2;
#endif

template <int kRows, int kOuts, class C>
inline void dot_tile(C* out, int64_t out_stride, const C* left, int64_t left_stride, const C* right,
                     int64_t right_stride, int64_t inner, C scale) {
  Vec<C> sums[kRows][kOuts] = {};
  int64_t k = 0;
  for (; k + kLanes<C> <= inner; k += kLanes<C>) {
    Vec<C> values[kRows];
    for (int i = 0; i < kRows; ++i) values[i] = load(left + i * left_stride + k);
    for (int j = 0; j < kOuts; ++j) {
      const Vec<C> factor = load(right + j * right_stride + k);
      for (int i = 0; i < kRows; ++i) sums[i][j] += values[i] * factor;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kOuts; ++j) {
      C sum = sum_lanes(sums[i][j]);
      for (int64_t tail = k; tail < inner; ++tail) sum += left[i * left_stride + tail] * right[j * right_stride + tail];
      out[i * out_stride + j] = scale * sum;
    }
  }
}

template <int kRows, class C>
inline void dot_rows(C* out, int64_t out_stride, const C* left, int64_t left_stride, const C* right,
                     int64_t right_stride, int64_t outs, int64_t inner, C scale) {
  int64_t j = 0;
  for (; j + kDotOuts <= outs; j += kDotOuts) {
    dot_tile<kRows, kDotOuts>(out + j, out_stride, left, left_stride, right + j * right_stride, right_stride, inner,
                              scale);
  }
  for (; j < outs; ++j) {
    dot_tile<kRows, 1>(out + j, out_stride, left, left_stride, right + j * right_stride, right_stride, inner, scale);
  }
}

template <class C>
void dot_products(C* out, int64_t out_stride, const C* left, int64_t left_stride, int64_t rows, const C* right,
                  int64_t right_stride, int64_t outs, int64_t inner, C scale) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) {
    dot_rows<kDotRows>(out + i * out_stride, out_stride, left + i * left_stride, left_stride, right, right_stride, outs,
                       inner, scale);
  }
  for (; i < rows; ++i) {
    dot_rows<1>(out + i * out_stride, out_stride, left + i * left_stride, left_stride, right, right_stride, outs, inner,
                scale);
  }
}

// The left factor of a rank update, with any strides (so that a transpose costs nothing).
template <class C>
struct Left {
  const C* data;
  int64_t row_stride;
  int64_t inner_stride;
};

// Rows of packed keep-bits from row 0 of the target on, or none.
template <class C>
struct Mask {
  const uint8_t* bits = nullptr;
  int64_t stride = 0;
  C scale = 1;
};

template <int kRows, int kVectors, class T>
inline void update_tile(const T* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t column, Mask<Acc<T>> mask) {
  using C = Acc<T>;
  Vec<C> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < inner; ++j) {
    Vec<C> factors[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = load(right + j * right_stride + column + v * kLanes<C>);
    for (int i = 0; i < kRows; ++i) {
      const C value = left.data[i * left.row_stride + j * left.inner_stride];
      for (int v = 0; v < kVectors; ++v) sums[i][v] += value * factors[v];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes<C>;
      Vec<C> sum = sums[i][v];
      if (mask.bits) sum = select_kept<C>(sum * mask.scale, mask.bits + i * mask.stride, at);
      store(target + i * target_stride + at, load(source + i * source_stride + at) + sum);
    }
  }
}

template <int kRows, class T>
inline void update_tail(const T* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t column, int64_t columns,
                        Mask<Acc<T>> mask) {
  using C = Acc<T>;
  for (int i = 0; i < kRows; ++i) {
    for (int64_t at = column; at < columns; ++at) {
      C sum = 0;
      for (int64_t j = 0; j < inner; ++j) {
        sum += left.data[i * left.row_stride + j * left.inner_stride] * right[j * right_stride + at];
      }
      if (mask.bits) sum = kept(mask.bits + i * mask.stride, at) ? sum * mask.scale : C(0);
      target[i * target_stride + at] = from_acc<T>(to_acc(source[i * source_stride + at]) + sum);
    }
  }
}

template <int kRows, class T>
inline void update_rows(const T* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t begin, int64_t end,
                        bool with_tail, Mask<Acc<T>> mask) {
  constexpr int64_t kLane = kLanes<Acc<T>>;
  int64_t column = begin;
  for (; column + kUpdateVectors * kLane <= end; column += kUpdateVectors * kLane) {
    update_tile<kRows, kUpdateVectors>(source, source_stride, target, target_stride, left, right, right_stride, inner,
                                       column, mask);
  }
  for (; column + kLane <= end; column += kLane) {
    update_tile<kRows, 1>(source, source_stride, target, target_stride, left, right, right_stride, inner, column, mask);
  }
  if (with_tail) {
    update_tail<kRows>(source, source_stride, target, target_stride, left, right, right_stride, inner, column, end,
                       mask);
  }
}

template <class T>
void rank_update(const T* source, int64_t source_stride, T* target, int64_t target_stride, int64_t rows,
                 int64_t columns, Left<Acc<T>> left, const Acc<T>* right, int64_t right_stride, int64_t inner,
                 Mask<Acc<T>> mask = {}) {
  // A panel of the right factor stays in the first-level cache while all rows pass over it.
  constexpr int64_t kPanelBytes = 16 * 1024;
  constexpr int64_t kTile = kUpdateVectors * kLanes<Acc<T>>;
  const int64_t fit = kPanelBytes / static_cast<int64_t>(sizeof(Acc<T>)) / (inner > 0 ? inner : 1);
  const int64_t panel = fit < kTile ? kTile : fit / kTile * kTile;
  for (int64_t begin = 0; begin < columns; begin += panel) {
    const bool last = begin + panel >= columns;
    const int64_t end = last ? columns : begin + panel;
    int64_t i = 0;
    const auto update = [&](auto tile) {
      constexpr int kRows = decltype(tile)::value;
      Mask<Acc<T>> rows_mask = mask;
      if (mask.bits) rows_mask.bits += i * mask.stride;
      const Left<Acc<T>> rows_left{left.data + i * left.row_stride, left.row_stride, left.inner_stride};
      update_rows<kRows>(source + i * source_stride, source_stride, target + i * target_stride, target_stride,
                         rows_left, right, right_stride, inner, begin, end, last, rows_mask);
      i += kRows;
    };
    while (i + kUpdateRows <= rows) update(Constant<kUpdateRows>{});
    while (i < rows) update(Constant<1>{});
  }
}

}  // namespace
}  // namespace peft_ext
