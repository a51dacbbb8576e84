// kron_linear of bfloat16 as one product on AMX, and the gradient of that product: kron_linear.h, operands: amx.h.
#pragma once

#include "amx.h"
#include "kron_linear.h"

#if defined(__AMX_BF16__)

namespace peft_ext {
namespace {

// The parts of H follow each other along the inner dimension.
inline void pack_product(const KronProductPacking& packing) {
  const auto* source = static_cast<const float*>(packing.product);
  auto* target = static_cast<BFloat16*>(packing.tiles);
  const int64_t in = packing.in, out = packing.out, inner = padded(in, kTileInner);
  for (int64_t j = 0; j < out; j += kTileOuts, target += kTileOuts * inner * kKronProductParts) {
    const __mmask16 lanes = first_lanes(out - j);
    const auto line = [&](int64_t k) {
      if (k >= in) return Vec<float>{};
      return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(lanes, source + k * out + j));
    };
    for (int64_t k = 0; k < inner; k += 2) {
      Vec<float> first = line(k), second = line(k + 1);
      for (int64_t part = 0; part < kKronProductParts; ++part) {
        store(reinterpret_cast<float*>(target + (part * inner + k) * kTileOuts), first_part_pairs(first, second));
        first = rest_of(first);
        second = rest_of(second);
      }
    }
  }
}

inline void multiply_product_block(const KronProduct& problem, int64_t begin, int64_t rows, void* memory) {
  constexpr int64_t kPanel = 64, kTall = 2 * kTileRows;
  alignas(64) float products[kTall * kPanel];
  const auto* tiles = static_cast<const BFloat16*>(problem.tiles);
  const UpdateTarget y{nullptr,          0,  static_cast<BFloat16*>(problem.y) + begin * problem.y_stride,
                       problem.y_stride, {}, static_cast<const float*>(problem.bias)};
  const int64_t inner = padded(problem.in, kTileInner), depth = kKronProductParts * inner;
  const PaddedRows x = padded_rows(memory, static_cast<const BFloat16*>(problem.x) + begin * problem.x_stride,
                                   problem.x_stride, rows, problem.in);
  for (int64_t j = 0; j < problem.out; j += kPanel) {
    const int64_t width = std::min(problem.out - j, kPanel);
    for (int64_t i = 0; i < rows; i += kTall) {
      const int64_t height = std::min(rows - i, kTall);
      multiply_all(products, kPanel, x.data + i * x.stride, x.stride, height, tiles + j * depth, depth, width, inner,
                   {kKronProductParts, 0, inner * kTileOuts});
      for (int64_t row = 0; row < height; ++row) y.add(i + row, j, width, products + row * kPanel);
    }
  }
}

inline void multiply_product(const KronProduct& problem, int64_t begin, int64_t end, void* memory) {
  with_tiles([&] {
    for (int64_t row = begin; row < end; row += problem.block) {
      multiply_product_block(problem, row, std::min(problem.block, end - row), memory);
    }
  });
}

inline void product_grad(const KronProductGrad& problem, int64_t begin, int64_t end, void* total_memory, void* memory) {
  constexpr int64_t kBlock = KronProductGrad::kBlock;
  const int64_t height = problem.height(), width = problem.width(), columns = padded(end - begin, kTileInner);
  auto* total = static_cast<float*>(total_memory) + begin;
  auto* left = static_cast<BFloat16*>(memory);
  BFloat16 *right = left + kBlock * height, *copy = right + kBlock * KronProductGrad::kPanel;
  for (int64_t i = 0; i < height; ++i) std::memset(total + i * width, 0, columns * sizeof(float));
  with_tiles([&] {
    for (int64_t row = 0; row < problem.rows; row += kBlock) {
      const int64_t rows = std::min(kBlock, problem.rows - row), depth = padded(rows, kTileInner);
      const auto rows_of = [&](const void* source, int64_t stride, int64_t first, int64_t count) {
        return padded_rows(copy, static_cast<const BFloat16*>(source) + row * stride + first, stride, rows, count);
      };
      pack_left_columns(left, rows_of(problem.left, problem.left_stride, 0, problem.left_columns), depth, height);
      pack_right_rows(right, rows_of(problem.right, problem.right_stride, begin, end - begin), depth, columns);
      multiply_all<true>(total, width, left, depth, height, right, depth, columns, depth);
    }
  });
}

}  // namespace
}  // namespace peft_ext

#endif
