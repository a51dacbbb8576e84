// The products of skinny.h in bfloat16 on AMX, whose tiles multiply sixteen rows by sixteen columns, 32 terms at once,
// and add up in float.
//
//   project  out [rows, outs]       = scale left [rows, inner] right [inner, outs]
//   update   target [rows, outs]    = source + mask . left right + bias
//   outer    total [outs, columns] += left [rows, outs]^T right [rows, columns]
//
// Left of `project` and right of `outer` are bfloat16 already. The other operands are float, cut into values of eight
// bits: v = v0 + v1 + v2, exactly; or factors that are bfloat16 and have one such part. `project` and `outer` take all
// parts, side by side as more outs, and add up their results; `update`, whose result is rounded to bfloat16, takes of
// left and right the pairs of parts that make up 16 bits, one after another along the inner dimension.
//
// Layout    a left operand: rows of bfloat16, padded with zeros to whole tiles. A right one: tiles of 32 x 16 values,
//           in which two neighbours along the inner dimension lie together; tiles of the same 16 outs follow each
//           other.
#pragma once

#include "lora_linear.h"
#include "skinny.h"
#include "tiles.h"
#include "transpose.h"
#include "vec.h"

#if defined(__AMX_BF16__)

namespace peft_ext {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Calls work() with the thread's eight tiles of sixteen rows of 64 bytes. Nothing in it throws.
template <class Work>
inline void with_tiles(const Work& work) {
  const TileConfig config;
  _tile_loadconfig(&config);
  work();
  _tile_release();
}

// --- operands ---

inline Vec<float> without_first_part(Vec<float> value) {
  return value - bit_cast<Vec<float>>(bit_cast<UInt32Vec>(value) & 0xffff0000u);
}

// The same also of infinity and NaN, which have one part.
inline Vec<float> rest_of(Vec<float> value) {
  const Vec<float> rest = without_first_part(value);
  return bit_cast<Vec<float>>(bit_cast<Int32Vec>(rest) & (rest == rest));
}

// The value's first eight bits, as bfloat16, of what the parts before have left.
inline UInt16HalfVec part_of(Vec<float> value, int part) {
  for (; part > 0; --part) value = rest_of(value);
  return narrow(bit_cast<UInt32Vec>(value) >> 16);
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes<float> ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __mmask32 first_lanes_32(int64_t count) {
  return count >= kTileInner ? 0xffffffffu : (1u << count) - 1;
}

inline Vec<float> widened(__m256i values) {
  return bit_cast<Vec<float>>(widen(bit_cast<UInt16HalfVec>(values)) << 16);
}

// The first eight bits of the values of two vectors, as bfloat16.
inline __m512i first_parts(Vec<float> low, Vec<float> high) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(bit_cast<__m512i>(low), odd, bit_cast<__m512i>(high));
}

// As right operands want them: the first eight bits of two rows, side by side in words.
inline Vec<float> first_part_pairs(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<float>>((bit_cast<UInt32Vec>(first) >> 16) | (bit_cast<UInt32Vec>(second) & 0xffff0000u));
}

inline void part_of_row(BFloat16* target, const float* source, int64_t count, int part, float scale = 1) {
  for (int64_t k = 0; k < count; k += kLanes<float>) {
    const __mmask16 lanes = first_lanes(count - k);
    const Vec<float> value = bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(lanes, source + k));
    _mm256_mask_storeu_epi16(target + k, lanes, bit_cast<__m256i>(part_of(value * scale, part)));
  }
}

inline void clear(BFloat16* target, int64_t count) {
  std::memset(target, 0, count * sizeof(BFloat16));
}

struct PaddedRows {
  const BFloat16* data;
  int64_t stride;
};

// Rows, zero where the mask drops them, and padded with zeros to whole tiles both ways: where they are, or copied. A
// row of the mask is there once draw(row) was called.
template <class Draw>
PaddedRows padded_rows(void* copy, const BFloat16* source, int64_t source_stride, int64_t rows, int64_t columns,
                       Mask<float> mask, const Draw& draw) {
  if (!mask.bits && columns % kTileInner == 0 && rows % kTileInner == 0) return {source, source_stride};
  auto* target = static_cast<BFloat16*>(copy);
  const int64_t stride = padded(columns, kTileInner);
  for (int64_t i = 0; i < rows; ++i) {
    if (mask.bits) draw(i);
    for (int64_t k = 0; k < columns; k += kTileInner) {
      __mmask32 lanes = first_lanes_32(columns - k);
      if (mask.bits) lanes &= load_unaligned<uint32_t>(mask.bits + i * mask.stride + k / 8);
      _mm512_storeu_si512(target + i * stride + k, _mm512_maskz_loadu_epi16(lanes, source + i * source_stride + k));
    }
  }
  clear(target + rows * stride, (padded(rows, kTileInner) - rows) * stride);
  return {target, stride};
}

inline PaddedRows padded_rows(void* copy, const BFloat16* source, int64_t source_stride, int64_t rows,
                              int64_t columns) {
  return padded_rows(copy, source, source_stride, rows, columns, {}, [](int64_t) {});
}

// right = source^T, for `project` or `update`.
inline void pack_right(const TilePacking& work) {
  auto* scratch = static_cast<BFloat16*>(work.scratch);
  auto* target = static_cast<BFloat16*>(work.target);
  const TileTerms terms(work.parts);
  const int64_t rows = work.for_update ? work.outs : work.outs * work.parts, inner = work.depth();
  const auto copy = [&work](BFloat16* to, int64_t line, int part) {
    const int64_t at = line * work.inner;
    if (!work.narrow) return part_of_row(to, static_cast<const float*>(work.source) + at, work.inner, part);
    std::memcpy(to, static_cast<const BFloat16*>(work.source) + at, work.inner * sizeof(BFloat16));
  };
  for (int64_t row = 0; row < rows; row += kTileOuts, target += kTileOuts * inner) {
    clear(scratch, kTileOuts * inner);
    for (int64_t i = 0; i < std::min(kTileOuts, rows - row); ++i) {
      const int64_t line = (row + i) % work.outs;
      BFloat16* to = scratch + i * inner;
      if (!work.for_update) copy(to, line, static_cast<int>((row + i) / work.outs));
      for (int term = 0; work.for_update && term < terms.count; ++term) {
        copy(to + term * work.inner, line, terms.right[term]);
      }
    }
    // Pairs of neighbours are words.
    transpose(reinterpret_cast<const float*>(scratch), inner / 2, kTileOuts, inner / 2,
              reinterpret_cast<float*>(target), kTileOuts);
  }
}

// Left of `update`: the rows' parts, one term after another.
inline void pack_left(BFloat16* target, const float* source, int64_t source_stride, int64_t rows, int64_t inner,
                      const TileTerms& terms) {
  const int64_t stride = padded(inner * terms.count, kTileInner);
  clear(target, padded(rows, kTileRows) * stride);
  for (int64_t i = 0; i < rows; ++i) {
    for (int term = 0; term < terms.count; ++term) {
      part_of_row(target + i * stride + term * inner, source + i * source_stride, inner, terms.left[term]);
    }
  }
}

// Left of `outer`, transposed: [parts * outs, rows], times `scale`.
inline void pack_left_t(BFloat16* target, const float* source, int64_t source_stride, int64_t rows, int64_t outs,
                        int64_t parts, float scale, float* scratch) {
  const int64_t stride = padded(rows, kTileInner);
  clear(target, padded(parts * outs, kTileRows) * stride);
  transpose(source, source_stride, rows, outs, scratch, rows);
  for (int64_t j = 0; j < parts * outs; ++j) {
    part_of_row(target + j * stride, scratch + j % outs * rows, rows, static_cast<int>(j / outs), scale);
  }
}

// Two lines of two columns of right tiles, `apart` from each other; if 0, of the first alone.
inline void store_pairs(BFloat16* target, int64_t apart, __m512i first, __m512i second) {
  const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  if (apart) _mm512_storeu_si512(target + apart, _mm512_permutex2var_epi16(first, odd, second));
  _mm512_storeu_si512(target, _mm512_permutex2var_epi16(first, even, second));
}

// Two columns of right tiles, of the columns [0, 32) of rows that are padded to whole tiles: [2][rows][16].
inline void pack_pairs(BFloat16* target, const BFloat16* source, int64_t stride, int64_t rows) {
  for (int64_t k = 0; k < rows; k += 2) {
    store_pairs(target + k * kTileOuts, rows * kTileOuts, _mm512_loadu_si512(source + k * stride),
                _mm512_loadu_si512(source + (k + 1) * stride));
  }
}

// The right operand that is the rows, of so many columns.
inline void pack_right_rows(BFloat16* target, const PaddedRows& source, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 2 * kTileOuts) {
    pack_pairs(target + j * rows, source.data + j, source.stride, rows);
  }
}

// right = source, of bfloat16, for `project` or `update`.
inline void pack_right_lines(const TilePacking& work) {
  const auto* source = static_cast<const BFloat16*>(work.source);
  auto* target = static_cast<BFloat16*>(work.target);
  const int64_t depth = work.depth(), lines = work.inner * (work.for_update ? TileTerms(work.parts).count : 1);
  for (int64_t j = 0; j < work.outs; j += 2 * kTileOuts, target += 2 * kTileOuts * depth) {
    const __mmask32 lanes = first_lanes_32(work.outs - j);
    const auto line = [&](int64_t k) {
      return _mm512_maskz_loadu_epi16(k < lines ? lanes : 0, source + k % work.inner * work.outs + j);
    };
    const int64_t apart = j + kTileOuts < work.outs ? depth * kTileOuts : 0;
    for (int64_t k = 0; k < depth; k += 2) store_pairs(target + k * kTileOuts, apart, line(k), line(k + 1));
  }
}

// The left operand [columns, rows] that is the transpose of at most kTileMostRows rows.
inline void pack_left_columns(BFloat16* target, const PaddedRows& source, int64_t rows, int64_t columns) {
  alignas(64) BFloat16 pairs[2 * kTileOuts * kTileMostRows];
  for (int64_t j = 0; j < columns; j += 2 * kTileOuts) {
    pack_pairs(pairs, source.data + j, source.stride, rows);
    for (int64_t half = 0; half < 2; ++half) {
      transpose(reinterpret_cast<const float*>(pairs + half * rows * kTileOuts), kTileOuts, rows / 2, kTileOuts,
                reinterpret_cast<float*>(target + (j + half * kTileOuts) * rows), rows / 2);
    }
  }
}

// --- products ---

// Operands in parts that lie so far apart; a step of 0: there is one for all.
struct TileParts {
  int64_t count = 1, left_step = 0, right_step = 0;
};

// out = left right, or with kAdd added to it, of kM x kN tiles, summed over parts; `right_stride` between right's
// columns of tiles.
template <int kM, int kN, bool kPrefetch = false, bool kAdd = false>
inline void multiply_tiles(float* out, int64_t out_stride, const BFloat16* left, int64_t left_stride,
                           const BFloat16* right, int64_t right_stride, int64_t inner, const TileParts& parts = {}) {
  asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory.
  float *below = out + kTileRows * out_stride, *beside = out + kTileOuts, *across = below + kTileOuts;
  if constexpr (kAdd) {
    _tile_loadd(0, out, out_stride * 4);
    if constexpr (kN > 1) _tile_loadd(1, beside, out_stride * 4);
    if constexpr (kM > 1) _tile_loadd(2, below, out_stride * 4);
    if constexpr (kM > 1 && kN > 1) _tile_loadd(3, across, out_stride * 4);
  } else {
    _tile_zero(0);
    if constexpr (kN > 1) _tile_zero(1);
    if constexpr (kM > 1) _tile_zero(2);
    if constexpr (kM > 1 && kN > 1) _tile_zero(3);
  }
  for (int64_t part = 0; part < parts.count; ++part, left += parts.left_step, right += parts.right_step) {
    for (int64_t k = 0; k < inner; k += kTileInner) {
      if constexpr (kPrefetch) {
        for (int i = 0; i < kM * kTileRows; ++i)
          __builtin_prefetch(left + (kM * kTileRows + i) * left_stride + k, 0, 2);
      }
      _tile_loadd(4, left + k, left_stride * 2);
      _tile_loadd(6, right + k * kTileOuts, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kN > 1) {
        _tile_loadd(7, right + right_stride + k * kTileOuts, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kM > 1) {
        _tile_loadd(5, left + kTileRows * left_stride + k, left_stride * 2);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kM > 1 && kN > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_stride * 4);
  if constexpr (kN > 1) _tile_stored(1, beside, out_stride * 4);
  if constexpr (kM > 1) _tile_stored(2, below, out_stride * 4);
  if constexpr (kM > 1 && kN > 1) _tile_stored(3, across, out_stride * 4);
}

// Calls multiply(first row, first out, Constant<kM>, Constant<kN>) for blocks of up to two by two tiles.
template <class Multiply>
inline void for_tiles(int64_t rows, int64_t outs, const Multiply& multiply) {
  for (int64_t i = 0; i < rows; i += 2 * kTileRows) {
    for (int64_t j = 0; j < outs; j += 2 * kTileOuts) {
      const bool tall = i + kTileRows < rows, wide = j + kTileOuts < outs;
      if (tall && wide) {
        multiply(i, j, Constant<2>{}, Constant<2>{});
      } else if (tall) {
        multiply(i, j, Constant<2>{}, Constant<1>{});
      } else if (wide) {
        multiply(i, j, Constant<1>{}, Constant<2>{});
      } else {
        multiply(i, j, Constant<1>{}, Constant<1>{});
      }
    }
  }
}

// out = left right, or with kAdd added to it, of whole tiles; `right_stride` between the outs of right.
template <bool kAdd = false>
inline void multiply_all(float* out, int64_t out_stride, const BFloat16* left, int64_t left_stride, int64_t rows,
                         const BFloat16* right, int64_t right_stride, int64_t outs, int64_t inner,
                         const TileParts& parts = {}) {
  for_tiles(rows, outs, [&](int64_t i, int64_t j, auto m, auto n) {
    multiply_tiles<decltype(m)::value, decltype(n)::value, false, kAdd>(
        out + i * out_stride + j, out_stride, left + i * left_stride, left_stride, right + j * right_stride,
        kTileOuts * right_stride, inner, parts);
  });
}

// `products`: memory for [rows, parts * outs], padded to whole tiles.
inline void project_by_tiles(float* out, int64_t out_stride, const BFloat16* left, int64_t left_stride, int64_t rows,
                             const BFloat16* right, int64_t outs, int parts, int64_t inner, float scale,
                             float* products) {
  const int64_t stride = padded(parts * outs, kTileOuts), depth = padded(inner, kTileInner);
  // Where right is more than stays in the cache, a part of the inner dimension serves all rows before the next one.
  constexpr int64_t kPanel = 1024;
  const int64_t panel = stride * depth <= kTileCacheValues ? depth : kPanel;
  const auto multiply = [&](int64_t k, auto add) {
    for_tiles(rows, stride, [&](int64_t i, int64_t j, auto m, auto n) {
      multiply_tiles<decltype(m)::value, decltype(n)::value, true, decltype(add)::value>(
          products + i * stride + j, stride, left + i * left_stride + k, left_stride, right + j * depth + k * kTileOuts,
          kTileOuts * depth, std::min(depth - k, panel));
    });
  };
  multiply(0, Constant<false>{});
  for (int64_t k = panel; k < depth; k += panel) multiply(k, Constant<true>{});
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = products + i * stride;
    for (int64_t j = 0; j < outs; j += kLanes<float>) {
      const __mmask16 lanes = first_lanes(outs - j);
      __m512 sum = _mm512_maskz_loadu_ps(lanes, row + j);
      for (int part = 1; part < parts; ++part) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, row + part * outs + j));
      }
      _mm512_mask_storeu_ps(out + i * out_stride + j, lanes, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
    }
  }
}

// Where `update` adds its products to: the rows of a panel of columns.
struct UpdateTarget {
  // Of the next columns, while these are worked on: a panel's lines are too few for the hardware to run ahead.
  void prefetch(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t j = column; j < column + columns; j += 32) __builtin_prefetch(target + i * target_stride + j, 1);
    }
  }

  // target = source + mask . products + bias, of a row.
  void add(int64_t row, int64_t column, int64_t columns, const float* products) const {
    const BFloat16* from = source ? source + row * source_stride + column : nullptr;
    BFloat16* to = target + row * target_stride + column;
    const uint8_t* bits = mask.bits ? mask.bits + row * mask.stride + column / 8 : nullptr;
    const float scale = mask.scale;
    constexpr int64_t kPair = 2 * kLanes<float>;
    for (int64_t j = 0; j < columns; j += kPair) {
      const __mmask32 lanes = first_lanes_32(columns - j);
      Vec<float> first = load(products + j), second = load(products + j + kLanes<float>);
      if (bits) {
        first = select_kept<float>(first * scale, bits, j);
        second = select_kept<float>(second * scale, bits, j + kLanes<float>);
      }
      if (bias) {
        const auto both = static_cast<uint64_t>(lanes);
        first += bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(both), bias + column + j));
        second += bit_cast<Vec<float>>(
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(both >> 16), bias + column + j + kLanes<float>));
      }
      if (from) {
        const __m512i values = _mm512_maskz_loadu_epi16(lanes, from + j);
        first += widened(_mm512_castsi512_si256(values));
        second += widened(_mm512_extracti64x4_epi64(values, 1));
      }
      const auto rounded = _mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
      _mm512_mask_storeu_epi16(to + j, lanes, bit_cast<__m512i>(rounded));
    }
  }

  const BFloat16* source;
  int64_t source_stride;
  BFloat16* target;
  int64_t target_stride;
  Mask<float> mask;
  const float* bias;  // Or null.
};

// left as pack_left, right as pack_right for_update gives them.
inline void update_by_tiles(const UpdateTarget& target, int64_t rows, int64_t outs, const BFloat16* left,
                            const BFloat16* right, int64_t inner) {
  constexpr int64_t kPanel = 64, kTall = 2 * kTileRows;
  alignas(64) float products[kTall * kPanel];
  const int64_t depth = padded(inner, kTileInner);
  // Where right is more than stays in the cache, a panel of it serves all rows before the next one.
  const int64_t band = padded(outs, kTileOuts) * depth <= kTileCacheValues ? kTall : rows;
  const auto update = [&](int64_t i, int64_t j) {
    const int64_t height = std::min(rows - i, kTall), width = std::min(outs - j, kPanel);
    target.prefetch(i, height, j + kPanel, std::min(outs - j - kPanel, kPanel));
    for_tiles(height, width, [&](int64_t, int64_t column, auto m, auto n) {
      multiply_tiles<decltype(m)::value, decltype(n)::value>(products + column, kPanel, left + i * depth, depth,
                                                             right + (j + column) * depth, kTileOuts * depth, depth);
    });
    for (int64_t row = 0; row < height; ++row) target.add(i + row, j, width, products + row * kPanel);
  };
  for (int64_t first = 0; first < rows; first += band) {
    for (int64_t j = 0; j < outs; j += kPanel) {
      for (int64_t i = first; i < std::min(rows, first + band); i += kTall) update(i, j);
    }
  }
}

// left as pack_left_t gives it; the rows of right are padded with zeros to whole tiles both ways.
inline void outer_by_tiles(float* total, int64_t columns, const BFloat16* left, int64_t outs, int64_t parts,
                           const BFloat16* right, int64_t right_stride, int64_t rows) {
  constexpr int64_t kWide = 2 * kTileOuts;
  alignas(64) BFloat16 pairs[kTileMostRows * kWide];
  alignas(64) float products[2 * kTileRows * kWide];
  const int64_t depth = padded(rows, kTileInner);
  // Parts in tiles of their own are summed there.
  const bool apart = outs % kTileRows == 0;
  const int64_t lines = apart ? outs : parts * outs;
  const TileParts steps{apart ? parts : 1, outs * depth, 0};
  for (int64_t j = 0; j < columns; j += kWide) {
    pack_pairs(pairs, right + j, right_stride, depth);
    for_tiles(lines, kWide, [&](int64_t i, int64_t, auto m, auto) {
      constexpr int kM = decltype(m)::value;
      multiply_tiles<kM, 2>(products, kWide, left + i * depth, depth, pairs, kTileOuts * depth, depth, steps);
      for (int64_t line = i; line < std::min(lines, i + kM * kTileRows); ++line) {
        float* target = total + line % outs * columns + j;
        const float* row = products + (line - i) * kWide;
        for (int64_t v = 0; v < std::min(kWide, columns - j); v += kLanes<float>) {
          const __mmask16 lanes = first_lanes(columns - j - v);
          const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, target + v), _mm512_loadu_ps(row + v));
          _mm512_mask_storeu_ps(target + v, lanes, sum);
        }
      }
    });
  }
}

}  // namespace
}  // namespace peft_ext

#endif
