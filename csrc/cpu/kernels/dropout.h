// Counter-based dropout. keep(row, column) is a pure function of the seed, so that forward and
// backward agree without a stored mask.
//
// Philox4x32-7 (Salmon et al., SC 2011) on the counter (column / 8, 0, low row, high row) under the
// key (low seed, high seed) gives four words; their eight 16-bit halves, low first, decide eight
// neighbouring columns: keep where half >= threshold = round(65536 p). peft_ext/reference/dropout.py
// is the same definition in PyTorch.
//
// A row's mask is packed, one bit a column, one byte a Philox block: bit i of byte b is column 8b+i.
#pragma once

#include "lora_linear.h"
#include "vec.h"

namespace peft_ext {
namespace {

using UInt64Vec = Vec<uint64_t>;  // One Philox block a lane; only the low half of a lane counts.

inline UInt64Vec multiply_low_halves(UInt64Vec a, UInt64Vec b) {
#if defined(__AVX512F__)
  return bit_cast<UInt64Vec>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<UInt64Vec>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<UInt64Vec>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// One bit per 16-bit value of first (a block's halves 0..3 in each lane) and second (4..7).
inline uint64_t keep_bits(UInt64Vec first, UInt64Vec second, uint16_t threshold) {
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const __m512i a = bit_cast<__m512i>(first), b = bit_cast<__m512i>(second);
  // threshold - value, saturated at zero, is zero exactly where the value is kept; packing keeps that.
  const __m512i even = _mm512_subs_epu16(limit, _mm512_unpacklo_epi64(a, b));
  const __m512i odd = _mm512_subs_epu16(limit, _mm512_unpackhi_epi64(a, b));
  const __m512i missing = _mm512_packs_epi16(even, odd);
  return _mm512_testn_epi8_mask(missing, missing);
#elif defined(__AVX2__)
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i a = bit_cast<__m256i>(first), b = bit_cast<__m256i>(second);
  const __m256i even = _mm256_subs_epu16(limit, _mm256_unpacklo_epi64(a, b));
  const __m256i odd = _mm256_subs_epu16(limit, _mm256_unpackhi_epi64(a, b));
  const __m256i missing = _mm256_packs_epi16(even, odd);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(missing, _mm256_setzero_si256())));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes<uint64_t>; ++lane) {
    for (int half = 0; half < 4; ++half) {
      const uint64_t low = (first[lane] >> (16 * half)) & 0xffff, high = (second[lane] >> (16 * half)) & 0xffff;
      bits |= static_cast<uint64_t>(low >= threshold) << (8 * lane + half);
      bits |= static_cast<uint64_t>(high >= threshold) << (8 * lane + 4 + half);
    }
  }
  return bits;
#endif
}

constexpr int kPhiloxRounds = 7;
constexpr int kBlocksPerVector = kLanes<uint64_t>;
constexpr int kColumnsPerBlock = 8;

// Bytes of a row's packed mask, rounded up to whole vectors of Philox blocks.
inline int64_t mask_bytes(int64_t columns) {
  const int64_t blocks = (columns + kColumnsPerBlock - 1) / kColumnsPerBlock;
  return (blocks + kBlocksPerVector - 1) / kBlocksPerVector * kBlocksPerVector;
}

constexpr int kVectorsTogether = 4;  // One alone waits for its own products.

// The mask of kVectors vectors of blocks, the first of which is `block`.
template <int kVectors>
inline void draw_blocks(uint8_t* mask, UInt64Vec block, int64_t row, const Dropout& dropout) {
  const UInt64Vec multiplier0 = UInt64Vec{} + 0xD2511F53u, multiplier1 = UInt64Vec{} + 0xCD9E8D57u;
  const UInt64Vec low_half = UInt64Vec{} + 0xffffffffu;
  UInt64Vec c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = block + static_cast<uint64_t>(v * kBlocksPerVector);
    c1[v] = UInt64Vec{};
    c2[v] = UInt64Vec{} + static_cast<uint64_t>(row);
    c3[v] = UInt64Vec{} + static_cast<uint64_t>(row >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int v = 0; v < kVectors; ++v) {
      const UInt64Vec product0 = multiply_low_halves(c0[v], multiplier0);
      const UInt64Vec product1 = multiply_low_halves(c2[v], multiplier1);
      c0[v] = (product1 >> 32) ^ c1[v] ^ static_cast<uint64_t>(k0);
      c1[v] = product1;
      c2[v] = (product0 >> 32) ^ c3[v] ^ static_cast<uint64_t>(k1);
      c3[v] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int v = 0; v < kVectors; ++v) {
    const UInt64Vec first = (c0[v] & low_half) | (c1[v] << 32), second = (c2[v] & low_half) | (c3[v] << 32);
    const uint64_t bits = keep_bits(first, second, dropout.threshold);
    std::memcpy(mask + v * kBlocksPerVector, &bits, kBlocksPerVector);
  }
}

// The part of a row's mask that has the columns [begin, end).
inline void row_mask(uint8_t* mask, int64_t row, int64_t begin, int64_t end, const Dropout& dropout) {
  int64_t byte = begin / kColumnsPerBlock / kBlocksPerVector * kBlocksPerVector;
  const int64_t bytes = mask_bytes(end);
  if (dropout.threshold > 0xffff) {
    std::memset(mask + byte, 0, bytes - byte);
    return;
  }
  UInt64Vec block;
  for (int lane = 0; lane < kBlocksPerVector; ++lane) block[lane] = byte + lane;
  const auto advance = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    draw_blocks<kVectors>(mask + byte, block, row, dropout);
    block += kVectors * kBlocksPerVector;
    byte += kVectors * kBlocksPerVector;
  };
  while (byte + kVectorsTogether * kBlocksPerVector <= bytes) advance(Constant<kVectorsTogether>{});
  while (byte < bytes) advance(Constant<1>{});
}

inline bool kept(const uint8_t* mask, int64_t column) {
  return mask[column / 8] >> (column % 8) & 1;
}

// value where the mask keeps columns [column, column + lanes), 0 elsewhere; column a multiple of lanes.
template <class C>
inline Vec<C> select_kept(Vec<C> value, const uint8_t* mask, int64_t column) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    uint16_t bits;
    std::memcpy(&bits, mask + static_cast<uint64_t>(column) / 8, sizeof(bits));
    return bit_cast<Vec<C>>(_mm512_maskz_mov_ps(bits, bit_cast<__m512>(value)));
  } else {
    return bit_cast<Vec<C>>(_mm512_maskz_mov_pd(mask[static_cast<uint64_t>(column) / 8], bit_cast<__m512d>(value)));
  }
#else
  static_assert(kLanes<C> <= kColumnsPerBlock);
  using Bits = Vec<UnsignedOf<C>>;
  Bits lane_bit;
  for (int lane = 0; lane < kLanes<C>; ++lane) lane_bit[lane] = 1u << lane;
  const Bits bits = Bits{} + static_cast<UnsignedOf<C>>(mask[static_cast<uint64_t>(column) / 8] >>
                                                        (static_cast<uint64_t>(column) % 8));
  return bit_cast<Vec<C>>(bit_cast<Bits>(value) & bit_cast<Bits>((bits & lane_bit) != 0));
#endif
}

}  // namespace
}  // namespace peft_ext
