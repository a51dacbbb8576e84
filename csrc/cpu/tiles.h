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

// Tiles of the transposes of `pieces` equal pieces of the lines of `source` (float, contiguous).
inline at::Tensor pack_tiles(const at::Tensor& source, int64_t pieces, int parts, bool for_update) {
  TilePacking packing{};
  packing.outs = source.size(0) / pieces;
  packing.inner = source.size(1);
  packing.parts = parts;
  packing.for_update = for_update;
  const auto bfloat16 = source.options().dtype(at::kBFloat16);
  const at::Tensor target = at::empty({pieces, packing.lines() * packing.depth()}, bfloat16);
  const at::Tensor scratch = at::empty({kTileOuts, packing.depth()}, bfloat16);
  packing.scratch = scratch.data_ptr();
  const int64_t piece = packing.outs * packing.inner * source.element_size();
  for (int64_t i = 0; i < pieces; ++i) {
    packing.source = static_cast<const char*>(source.const_data_ptr()) + i * piece;
    packing.target = static_cast<char*>(target.data_ptr()) + i * target.stride(0) * target.element_size();
    lora_kernels(at::kBFloat16).pack_tiles(packing);
  }
  return target;
}

// As source.t().contiguous(), sooner.
inline at::Tensor transposed(const at::Tensor& source) {
  const at::Tensor target = at::empty({source.size(1), source.size(0)}, source.options());
  lora_kernels(source.scalar_type())
      .transpose({source.const_data_ptr(), source.size(0), source.size(1), target.data_ptr(), source.size(0)});
  return target;
}

}  // namespace peft_ext
