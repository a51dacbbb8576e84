// Factors as right operands of AMX products (kernels/amx.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cpu/capability.h"
#include "cpu/kernels.h"

namespace peft_ext {

// Whether the products of `rows` run on tiles, for which the factors are packed first: from `worthwhile` rows on.
inline bool uses_tiles(const at::Tensor& rows, int64_t worthwhile) {
  return rows.scalar_type() == at::kBFloat16 && rows.size(0) >= worthwhile && cpu_has_amx();
}

// Parts of a factor's values: see kernels/amx.h.
inline int tile_parts(const at::Tensor& first, const at::Tensor& second) {
  return first.scalar_type() == at::kBFloat16 && second.scalar_type() == at::kBFloat16 ? 1 : 3;
}

// The memory of `packing`, as tiles for each of so many pieces.
inline at::Tensor make_tiles(TilePacking& packing, int64_t pieces, const at::Tensor& source, int parts,
                             bool for_update) {
  packing.narrow = source.scalar_type() == at::kBFloat16;
  packing.parts = parts;
  packing.for_update = for_update;
  return at::empty({pieces, packing.lines() * packing.depth()}, source.options().dtype(at::kBFloat16));
}

inline void pack_pieces(TilePacking& packing, const at::Tensor& source, const at::Tensor& target,
                        void (*pack)(const TilePacking&)) {
  if (target.numel() == 0) return;  // There is no memory to write to.
  const int64_t piece = packing.outs * packing.inner * source.element_size();
  for (int64_t i = 0; i < target.size(0); ++i) {
    packing.source = static_cast<const char*>(source.const_data_ptr()) + i * piece;
    packing.target = static_cast<char*>(target.data_ptr()) + i * target.stride(0) * target.element_size();
    pack(packing);
  }
}

// Tiles of the transposes of `pieces` equal pieces of the lines of `source` (contiguous; float, or bfloat16 of one
// part).
inline at::Tensor pack_tiles(const at::Tensor& source, int64_t pieces, int parts, bool for_update) {
  TilePacking packing{};
  packing.outs = source.size(0) / pieces;
  packing.inner = source.size(1);
  const at::Tensor target = make_tiles(packing, pieces, source, parts, for_update);
  const at::Tensor scratch = at::empty({kTileOuts, packing.depth()}, target.options());
  packing.scratch = scratch.data_ptr();
  pack_pieces(packing, source, target, lora_kernels(at::kBFloat16).pack_tiles);
  return target;
}

// Equal pieces of the lines of `source`, each transposed.
inline at::Tensor transposed(const at::Tensor& source, int64_t pieces) {
  const int64_t lines = source.size(0) / pieces, columns = source.size(1);
  const at::Tensor target = at::empty({pieces * columns, lines}, source.options());
  const int64_t piece = lines * columns * source.element_size();
  for (int64_t i = 0; i < pieces; ++i) {
    const char* from = static_cast<const char*>(source.const_data_ptr()) + i * piece;
    lora_kernels(source.scalar_type())
        .transpose({from, lines, columns, static_cast<char*>(target.data_ptr()) + i * piece, lines});
  }
  return target;
}

// Tiles of the pieces themselves.
inline at::Tensor pack_tile_lines(const at::Tensor& source, int64_t pieces, int parts, bool for_update) {
  if (source.scalar_type() != at::kBFloat16) {
    return pack_tiles(transposed(source, pieces), pieces, parts, for_update);
  }
  TilePacking packing{};
  packing.outs = source.size(1);
  packing.inner = source.size(0) / pieces;
  const at::Tensor target = make_tiles(packing, pieces, source, parts, for_update);
  pack_pieces(packing, source, target, lora_kernels(at::kBFloat16).pack_tile_lines);
  return target;
}

}  // namespace peft_ext
