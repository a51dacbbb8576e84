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

// y = products (+ bias), of one row.
inline void store_product(BFloat16* y, const float* products, const float* bias, int64_t columns) {
  constexpr int64_t kLane = kLanes<float>;
  for (int64_t j = 0; j < columns; j += 2 * kLane) {
    __m512 first = bit_cast<__m512>(load(products + j)), second = bit_cast<__m512>(load(products + j + kLane));
    if (bias) {
      first = _mm512_add_ps(first, _mm512_maskz_loadu_ps(first_lanes(columns - j), bias + j));
      if (j + kLane < columns) {
        second = _mm512_add_ps(second, _mm512_maskz_loadu_ps(first_lanes(columns - j - kLane), bias + j + kLane));
      }
    }
    _mm512_mask_storeu_epi16(y + j, first_lanes_32(columns - j), bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  }
}

inline void multiply_product_block(const KronProduct& problem, int64_t begin, int64_t rows, void* memory) {
  constexpr int64_t kPanel = 64, kTall = 2 * kTileRows;
  alignas(64) float products[kTall * kPanel];
  const auto* tiles = static_cast<const BFloat16*>(problem.tiles);
  const auto* bias = static_cast<const float*>(problem.bias);
  BFloat16* y = static_cast<BFloat16*>(problem.y) + begin * problem.y_stride;
  const int64_t inner = padded(problem.in, kTileInner), depth = kKronProductParts * inner;
  const PaddedRows x = padded_rows(memory, static_cast<const BFloat16*>(problem.x) + begin * problem.x_stride,
                                   problem.x_stride, rows, problem.in);
  for (int64_t j = 0; j < problem.out; j += kPanel) {
    const int64_t width = std::min(problem.out - j, kPanel);
    for (int64_t i = 0; i < rows; i += kTall) {
      const int64_t height = std::min(rows - i, kTall);
      multiply_all(products, kPanel, x.data + i * x.stride, x.stride, height, tiles + j * depth, depth, width, inner,
                   {kKronProductParts, 0, inner * kTileOuts});
      for (int64_t row = 0; row < height; ++row) {
        store_product(y + (i + row) * problem.y_stride + j, products + row * kPanel, bias ? bias + j : nullptr, width);
      }
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
  const int64_t height = problem.height(), width = problem.width();
  auto* total = static_cast<float*>(total_memory);
  auto* left = static_cast<BFloat16*>(memory);
  BFloat16 *right = left + kBlock * height, *copy = right + kBlock * width;
  std::memset(total, 0, height * width * sizeof(float));
  with_tiles([&] {
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t rows = std::min(kBlock, end - row), depth = padded(rows, kTileInner);
      const auto rows_of = [&](const void* source, int64_t stride, int64_t columns) {
        return padded_rows(copy, static_cast<const BFloat16*>(source) + row * stride, stride, rows, columns);
      };
      pack_left_columns(left, rows_of(problem.left, problem.left_stride, problem.left_columns), depth, height);
      pack_right_rows(right, rows_of(problem.right, problem.right_stride, problem.right_columns), depth, width);
      multiply_all<true>(total, width, left, depth, height, right, depth, width, depth);
    }
  });
}

}  // namespace
}  // namespace peft_ext

#endif
