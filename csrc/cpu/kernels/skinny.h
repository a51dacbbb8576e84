// The two shapes of product that low-rank adapters are made of, where a GEMM library spends more on
// packing than on arithmetic. Both keep their sums in registers and broadcast one element of the left
// factor at a time.
//
//   project       out [rows, outs]     = scale left [rows, inner] right [inner, outs], few outs; or += if accumulating
//   rank_update   target [rows, cols]  = source + mask . left [rows, inner] right [inner, cols], small inner;
//                                        a null source is zero
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "dropout.h"
#include "vec.h"

namespace peft_ext {
namespace {

#if defined(__AVX512F__)
constexpr int kProjectVectors = 2, kUpdateVectors = 3, kUpdateRows = 8;  // Of 32 registers, 16 and 24 hold sums.
#else
constexpr int kProjectVectors = 1, kUpdateVectors = 2, kUpdateRows = 4;  // Of 16, 8.
#endif
constexpr int kProjectRows = 8;
constexpr int64_t kProjectTerms = 256;

template <class C, int kCount>
using Lanes = typename VectorType<C, kCount * sizeof(C)>::type;

// A tile of a projection's left factor, and where the rows of the next one come from, in their own type.
template <class C, class T>
struct LeftTile {
  const C* data;
  int64_t stride;
  const T* next;  // Or null.
  int64_t next_stride;
};

// Calls visit(k) for k = 0, kStep, 2 kStep .. that have kStep elements left; returns the first k that has not. A tile's
// rows are too short as streams for the hardware to run ahead of: asks for those of the next tile, line by line.
template <int kRows, int kStep, class C, class T, class Visit>
inline int64_t for_each_step(const LeftTile<C, T>& left, int64_t inner, const Visit& visit) {
  constexpr int64_t kLine = 64 / sizeof(C);
  int64_t k = 0;
  for (; k + kLine <= inner; k += kLine) {
    if (left.next) {
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(left.next + i * left.next_stride + k);
    }
    for (int64_t step = 0; step < kLine; step += kStep) visit(k + step);
  }
  for (; k + kStep <= inner; k += kStep) visit(k);
  return k;
}

template <int kRows, class V, int kVectors, class C, class T>
inline void project_tile(C* out, int64_t out_stride, const LeftTile<C, T>& left, const C* right, int64_t right_stride,
                         int64_t inner, C scale, bool accumulate) {
  constexpr int kWidth = sizeof(V) / sizeof(C);
  V sums[kRows][kVectors] = {};
  for_each_step<kRows, 1>(left, inner, [&](int64_t k) {
    V factors[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = load_unaligned<V>(right + k * right_stride + v * kWidth);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sums[i][v] += left.data[i * left.stride + k] * factors[v];
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      C* target = out + i * out_stride + v * kWidth;
      V sum = scale * sums[i][v];
      if (accumulate) sum += load_unaligned<V>(target);
      std::memcpy(target, &sum, sizeof(V));
    }
  }
}

// The kFold values from `source` on, over and over.
template <int kFold, class C>
inline Vec<C> repeat(const C* source) {
  if constexpr (kFold * sizeof(C) == sizeof(uint64_t)) {
    return bit_cast<Vec<C>>(Vec<uint64_t>{} + load_unaligned<uint64_t>(source));
  } else {
#if defined(__AVX512F__)
    // GCC makes no broadcast of any other way to write this.
    return bit_cast<Vec<C>>(_mm512_broadcast_i32x4(load_unaligned<__m128i>(source)));
#endif
  }
}

// Lane kFold j + f of the result is lane kOuts f + j.
template <int kFold, class V, size_t... kLane>
inline V interleave(V value, std::index_sequence<kLane...>) {
  constexpr size_t kOuts = sizeof...(kLane) / kFold;
  return __builtin_shufflevector(value, value, (kLane % kFold * kOuts + kLane / kFold)...);
}

template <class V, size_t... kLane>
inline auto halves_added(V value, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(value, value, kLane...) +
         __builtin_shufflevector(value, value, (sizeof...(kLane) + kLane)...);
}

// The sum of a vector's kParts parts.
template <int kParts, class C, class V>
inline auto sum_of_parts(V value) {
  if constexpr (kParts == 1) {
    return value;
  } else {
    return sum_of_parts<kParts / 2, C>(halves_added(value, std::make_index_sequence<sizeof(V) / sizeof(C) / 2>()));
  }
}

// As many outs as fill 1 / kFold of a vector, in rows without gaps: a vector takes kFold of the inner dimension at
// once.
template <int kRows, int kFold, class C, class T>
inline void project_folded(C* out, int64_t out_stride, const LeftTile<C, T>& left, const C* right, int64_t inner,
                           C scale, bool accumulate) {
  constexpr int kOuts = kLanes<C> / kFold;
  using Outs = Lanes<C, kOuts>;
  constexpr auto kAllLanes = std::make_index_sequence<kLanes<C>>();
  Vec<C> sums[kRows] = {};
  const int64_t k = for_each_step<kRows, kFold>(left, inner, [&](int64_t at) {
    const Vec<C> factors = interleave<kFold>(load(right + at * kOuts), kAllLanes);
    for (int i = 0; i < kRows; ++i) sums[i] += repeat<kFold>(left.data + i * left.stride + at) * factors;
  });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    Outs sum = sum_of_parts<kFold, C>(interleave<kOuts>(sums[i], kAllLanes));
    for (int64_t tail = k; tail < inner; ++tail) {
      sum += left.data[i * left.stride + tail] * load_unaligned<Outs>(right + tail * kOuts);
    }
    C* target = out + i * out_stride;
    sum *= scale;
    if (accumulate) sum += load_unaligned<Outs>(target);
    std::memcpy(target, &sum, sizeof(sum));
  }
}

template <int kRows, class C, class T>
inline void project_rows(C* out, int64_t out_stride, const LeftTile<C, T>& left, const C* right, int64_t right_stride,
                         int64_t outs, int64_t inner, C scale, bool accumulate) {
  const bool dense = right_stride == outs;
  if constexpr (kLanes<C> >= 8) {
    if (dense && outs == kLanes<C> / 2) {
      return project_folded<kRows, 2>(out, out_stride, left, right, inner, scale, accumulate);
    }
  }
  if constexpr (kLanes<C> >= 16) {
    if (dense && outs == kLanes<C> / 4) {
      return project_folded<kRows, 4>(out, out_stride, left, right, inner, scale, accumulate);
    }
  }
  int64_t j = 0;
  for (; j + kProjectVectors * kLanes<C> <= outs; j += kProjectVectors * kLanes<C>) {
    project_tile<kRows, Vec<C>, kProjectVectors>(out + j, out_stride, left, right + j, right_stride, inner, scale,
                                                 accumulate);
  }
  for (; j + kLanes<C> <= outs; j += kLanes<C>) {
    project_tile<kRows, Vec<C>, 1>(out + j, out_stride, left, right + j, right_stride, inner, scale, accumulate);
  }
  if constexpr (kLanes<C> > 8) {
    if (j + 8 <= outs) {
      project_tile<kRows, Lanes<C, 8>, 1>(out + j, out_stride, left, right + j, right_stride, inner, scale, accumulate);
      j += 8;
    }
  }
  if constexpr (kLanes<C> > 4) {
    if (j + 4 <= outs) {
      project_tile<kRows, Lanes<C, 4>, 1>(out + j, out_stride, left, right + j, right_stride, inner, scale, accumulate);
      j += 4;
    }
  }
  for (; j < outs; ++j) {
    project_tile<kRows, C, 1>(out + j, out_stride, left, right + j, right_stride, inner, scale, accumulate);
  }
}

// As `project`, of a left factor that comes tile by tile: tile(row, rows, column, columns) gives the LeftTile of the
// elements from [row, column] on.
template <class C, class Tile>
void project_tiles(C* out, int64_t out_stride, const Tile& tile, int64_t rows, const C* right, int64_t right_stride,
                   int64_t outs, int64_t inner, C scale, bool accumulate = false) {
  // A piece of the inner dimension at a time: its rows of `right` stay in the first-level cache, and no sum runs
  // over more than kProjectTerms terms before it is added to the others.
  constexpr int64_t kFewTerms = 32, kPanel = 32 * 1024 / sizeof(C);
  const int64_t piece =
      std::clamp(kPanel / std::max<int64_t>(outs, 1) / kFewTerms * kFewTerms, kFewTerms, kProjectTerms);
  if (inner == 0 && !accumulate) {
    for (int64_t i = 0; i < rows; ++i) std::memset(out + i * out_stride, 0, outs * sizeof(C));
  }
  for (int64_t begin = 0; begin < inner; begin += piece) {
    const int64_t count = std::min(inner - begin, piece);
    int64_t i = 0;
    const auto advance = [&](auto height) {
      constexpr int kRows = decltype(height)::value;
      project_rows<kRows>(out + i * out_stride, out_stride, tile(i, kRows, begin, count), right + begin * right_stride,
                          right_stride, outs, count, scale, accumulate || begin > 0);
      i += kRows;
    };
    while (i + kProjectRows <= rows) advance(Constant<kProjectRows>{});
    if (i + 4 <= rows) advance(Constant<4>{});
    if (i + 2 <= rows) advance(Constant<2>{});
    if (i < rows) advance(Constant<1>{});
  }
}

template <class C>
void project(C* out, int64_t out_stride, const C* left, int64_t left_stride, int64_t rows, const C* right,
             int64_t right_stride, int64_t outs, int64_t inner, C scale, bool accumulate = false) {
  const auto tile = [&](int64_t row, int64_t height, int64_t column, int64_t) {
    const C* data = left + row * left_stride + column;
    return LeftTile<C, C>{data, left_stride, data + height * left_stride, left_stride};
  };
  project_tiles<C>(out, out_stride, tile, rows, right, right_stride, outs, inner, scale, accumulate);
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

// A tile's few lines of each row are too short a stream for the hardware to run ahead of: ask for the rows below
// while this tile is computed.
template <int kRows, int kVectors, class S, class T>
inline void prefetch_below(const S* source, int64_t source_stride, const T* target, int64_t target_stride,
                           int64_t column) {
  constexpr int64_t kStep = 64 / sizeof(T);
  for (int i = kRows; i < 2 * kRows; ++i) {
    for (int64_t at = column; at < column + kVectors * kLanes<Acc<T>>; at += kStep) {
      __builtin_prefetch(target + i * target_stride + at, 1);
      if (source && static_cast<const void*>(source) != target) __builtin_prefetch(source + i * source_stride + at, 0);
    }
  }
}

// What happens to a tile's sums: known at compile time for the largest tiles, where sums else leave the registers for a
// loop that asks at each.
enum class Update { kWrite, kWriteMasked, kAdd, kAny };

template <int kRows, int kVectors, Update kKind = Update::kAny, class S, class T>
inline void update_tile(const S* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t column, Mask<Acc<T>> mask) {
  using C = Acc<T>;
  prefetch_below<kRows, kVectors>(source, source_stride, target, target_stride, column);
  Vec<C> sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < inner; ++j) {
    Vec<C> factors[kVectors];
    for (int v = 0; v < kVectors; ++v) factors[v] = load(right + j * right_stride + column + v * kLanes<C>);
    for (int i = 0; i < kRows; ++i) {
      const C value = left.data[i * left.row_stride + j * left.inner_stride];
      for (int v = 0; v < kVectors; ++v) sums[i][v] += value * factors[v];
    }
  }
  const bool masks = kKind == Update::kWriteMasked || (kKind == Update::kAny && mask.bits);
  const bool adds = kKind == Update::kAdd || (kKind == Update::kAny && source);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column + v * kLanes<C>;
      Vec<C> sum = sums[i][v];
      if (masks) sum = select_kept<C>(sum * mask.scale, mask.bits + i * mask.stride, at);
      if (adds) sum += load(source + i * source_stride + at);
      store(target + i * target_stride + at, sum);
    }
  }
}

// As update_tile, for fewer columns than a vector has, where they need no conversion.
template <int kRows, int kColumns, class C>
inline void update_narrow(const C* source, int64_t source_stride, C* target, int64_t target_stride, Left<C> left,
                          const C* right, int64_t right_stride, int64_t inner, int64_t column) {
  using V = Lanes<C, kColumns>;
  V sums[kRows] = {};
  for (int64_t j = 0; j < inner; ++j) {
    const V factors = load_unaligned<V>(right + j * right_stride + column);
    for (int i = 0; i < kRows; ++i) sums[i] += left.data[i * left.row_stride + j * left.inner_stride] * factors;
  }
  for (int i = 0; i < kRows; ++i) {
    if (source) sums[i] += load_unaligned<V>(source + i * source_stride + column);
    std::memcpy(target + i * target_stride + column, &sums[i], sizeof(V));
  }
}

// a b + c, rounded as in vector code, where the compiler contracts it if the processor can. In a scalar loop it may
// take vectors for the products alone, and an element would then depend on how far it is from the end of its row.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <int kRows, class S, class T>
inline void update_tail(const S* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t column, int64_t columns,
                        Mask<Acc<T>> mask) {
  using C = Acc<T>;
  for (int i = 0; i < kRows; ++i) {
    for (int64_t at = column; at < columns; ++at) {
      C sum = 0;
      for (int64_t j = 0; j < inner; ++j) {
        sum = multiply_add(left.data[i * left.row_stride + j * left.inner_stride], right[j * right_stride + at], sum);
      }
      if (mask.bits) sum = kept(mask.bits + i * mask.stride, at) ? sum * mask.scale : C(0);
      if (source) sum += to_acc(source[i * source_stride + at]);
      target[i * target_stride + at] = from_acc<T>(sum);
    }
  }
}

template <int kRows, class S, class T>
inline void update_rows(const S* source, int64_t source_stride, T* target, int64_t target_stride, Left<Acc<T>> left,
                        const Acc<T>* right, int64_t right_stride, int64_t inner, int64_t begin, int64_t end,
                        bool with_tail, Mask<Acc<T>> mask) {
  constexpr int64_t kLane = kLanes<Acc<T>>;
  int64_t column = begin;
  const auto update_tiles = [&](auto kind) {
    for (; column + kUpdateVectors * kLane <= end; column += kUpdateVectors * kLane) {
      update_tile<kRows, kUpdateVectors, decltype(kind)::value>(source, source_stride, target, target_stride, left,
                                                                right, right_stride, inner, column, mask);
    }
  };
  if (kRows < kUpdateRows || (mask.bits && source)) {
    update_tiles(std::integral_constant<Update, Update::kAny>{});
  } else if (mask.bits) {
    update_tiles(std::integral_constant<Update, Update::kWriteMasked>{});
  } else if (source) {
    update_tiles(std::integral_constant<Update, Update::kAdd>{});
  } else {
    update_tiles(std::integral_constant<Update, Update::kWrite>{});
  }
  for (; column + kLane <= end; column += kLane) {
    update_tile<kRows, 1>(source, source_stride, target, target_stride, left, right, right_stride, inner, column, mask);
  }
  if constexpr (std::is_same_v<T, Acc<T>>) {
    const auto narrow = [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      if (!with_tail || mask.bits || kColumns >= kLane || column + kColumns > end) return;
      update_narrow<kRows, kColumns>(source, source_stride, target, target_stride, left, right, right_stride, inner,
                                     column);
      column += kColumns;
    };
    narrow(Constant<8>{});
    narrow(Constant<4>{});
    narrow(Constant<2>{});
  }
  if (with_tail) {
    update_tail<kRows>(source, source_stride, target, target_stride, left, right, right_stride, inner, column, end,
                       mask);
  }
}

// S: the source's type, T or the accumulation type.
template <class T, class S = T>
void rank_update(const std::type_identity_t<S>* source, int64_t source_stride, T* target, int64_t target_stride,
                 int64_t rows, int64_t columns, Left<Acc<T>> left, const Acc<T>* right, int64_t right_stride,
                 int64_t inner, Mask<Acc<T>> mask = {}) {
  // A panel of the right factor stays in the first-level cache while all rows pass over it.
  constexpr int64_t kPanelBytes = 64 * 1024;
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
      update_rows<kRows>(source ? source + i * source_stride : nullptr, source_stride, target + i * target_stride,
                         target_stride, rows_left, right, right_stride, inner, begin, end, last, rows_mask);
      i += kRows;
    };
    while (i + kUpdateRows <= rows) update(Constant<kUpdateRows>{});
    if (kUpdateRows > 4 && i + 4 <= rows) update(Constant<4>{});
    if (i + 2 <= rows) update(Constant<2>{});
    if (i < rows) update(Constant<1>{});
  }
}

}  // namespace
}  // namespace peft_ext
