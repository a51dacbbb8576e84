// How operands are laid out for AMX (amx.h), as the host has to know it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace peft_ext {

// A tile: sixteen rows of 32 terms on the left; 32 terms of sixteen outs on the right.
constexpr int64_t kTileRows = 16, kTileInner = 32, kTileOuts = 16;

// At most so many rows at a time; in a forward, which sums nothing over rows, fewer, which share out better.
constexpr int64_t kTileMostRows = 256, kTileForwardRows = 64;

constexpr int64_t padded(int64_t size, int64_t unit) {
  return (size + unit - 1) / unit * unit;
}

// Values of a right operand that stays in the second-level cache beside the rows it meets.
constexpr int64_t kTileCacheValues = 128 * 1024;

// Rows of a block that stays in the second-level cache, with so many bfloat16 values a row. Where gradients are summed
// over rows, the more the better.
inline int64_t tile_block_rows(int64_t row_values, int64_t most) {
  constexpr int64_t kValues = 512 * 1024;
  return std::clamp(kValues / std::max<int64_t>(row_values, 1) / kTileInner * kTileInner, kTileInner, most);
}

// The parts of a left operand of `outer`, whose result is as exact as the factors are.
constexpr int64_t outer_parts(int parts) {
  return parts == 1 ? 2 : 3;
}

// The parts of left and right that `update` multiplies, for a right factor of so many parts.
struct TileTerms {
  explicit constexpr TileTerms(int parts)
      : count(parts == 1 ? 2 : 3), left{0, parts == 1, 1}, right{0, parts == 1 ? 0 : 1, 0} {}

  int count;
  int left[3], right[3];
};

// target = source^T in tiles, where source is [outs, inner] without gaps; or target = source [inner, outs].
struct TilePacking {
  const void* source;
  bool narrow;  // Whether source is bfloat16, else of the accumulation type.
  int64_t outs;
  int64_t inner;
  int parts;        // Of a value of `source`: 1 if all are bfloat16, else 3.
  bool for_update;  // Or for `project`.
  void* target;
  void* scratch;  // Sixteen lines of target's inner dimension.

  // Of target, in bfloat16 values.
  int64_t depth() const { return padded(for_update ? inner * TileTerms(parts).count : inner, kTileInner); }
  int64_t lines() const { return padded(for_update ? outs : outs * parts, kTileOuts); }
};

}  // namespace peft_ext
