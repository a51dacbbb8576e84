// Vectors of the instruction set that this unit is compiled for, and loads and stores that widen
// bfloat16 and float16 to the accumulation type.
//
// Everything here has internal linkage: the same source is compiled once per instruction set, and a
// shared (weak) symbol would let the linker pick the AVX-512 copy for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
// No vector of these units crosses a unit's border, so how one would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC's own header reads a deliberately undefined register (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace peft_ext {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that a value of storage type T is computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The unsigned integer of the same width.
template <class C>
using UnsignedOf = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;

template <class C, int kBytes = kVectorBytes>
struct VectorType {
  typedef C type __attribute__((vector_size(kBytes)));
};
template <class C>
using Vec = typename VectorType<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

using Int32Vec = Vec<int32_t>;
using UInt32Vec = Vec<uint32_t>;
using UInt16HalfVec = typename VectorType<uint16_t, kVectorBytes / 2>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
inline V load_unaligned(const void* source) {
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// --- one value ---

inline float to_acc(float value) {
  return value;
}
inline double to_acc(double value) {
  return value;
}
inline float to_acc(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_acc(Half value) {
  // Shift exponent and mantissa to their float32 place and rescale by 2**112; subnormals come out
  // right because the multiplication normalises them.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000u) scaled = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | (value.bits & 0x8000u) << 16);
}

template <class T>
T from_acc(Acc<T> value);
template <>
inline float from_acc<float>(float value) {
  return value;
}
template <>
inline double from_acc<double>(double value) {
  return value;
}
template <>
inline BFloat16 from_acc<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Half from_acc<Half>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the float32 mantissa with units of 2**-24 and rounds to even.
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return {static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1)) >> 13))};
}

// --- one vector ---

// What __builtin_convertvector means, in the one instruction that GCC 12 does not make of it.
inline UInt32Vec widen(UInt16HalfVec values) {
#if defined(__AVX512F__)
  return bit_cast<UInt32Vec>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(values)));
#elif defined(__AVX2__)
  return bit_cast<UInt32Vec>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(values)));
#else
  return __builtin_convertvector(values, UInt32Vec);
#endif
}
inline UInt16HalfVec narrow(UInt32Vec values) {
#if defined(__AVX512F__)
  return bit_cast<UInt16HalfVec>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(values)));
#else
  return __builtin_convertvector(values, UInt16HalfVec);
#endif
}

inline Vec<float> load(const float* source) {
  return load_unaligned<Vec<float>>(source);
}
inline Vec<double> load(const double* source) {
  return load_unaligned<Vec<double>>(source);
}
inline Vec<float> load(const BFloat16* source) {
  return bit_cast<Vec<float>>(widen(load_unaligned<UInt16HalfVec>(source)) << 16);
}
inline Vec<float> load(const Half* source) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(load_unaligned<__m256i>(source)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(load_unaligned<__m128i>(source)));
#else
  Vec<float> value;
  for (int i = 0; i < kLanes<float>; ++i) value[i] = to_acc(source[i]);
  return value;
#endif
}

inline void store(float* target, Vec<float> value) {
  std::memcpy(target, &value, sizeof(value));
}
inline void store(double* target, Vec<double> value) {
  std::memcpy(target, &value, sizeof(value));
}
inline void store(BFloat16* target, Vec<float> value) {
  const auto bits = bit_cast<UInt32Vec>(value);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const UInt32Vec quiet_nan = UInt32Vec{} + 0x7fc0u;
  const UInt16HalfVec narrowed = narrow(value == value ? rounded : quiet_nan);
  std::memcpy(target, &narrowed, sizeof(narrowed));
}
inline void store(Half* target, Vec<float> value) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  for (int i = 0; i < kLanes<float>; ++i) target[i] = from_acc<Half>(value[i]);
#endif
}

template <class V>
inline auto sum_of_lanes(V value) {
  auto sum = value[0];
  for (size_t lane = 1; lane < sizeof(V) / sizeof(sum); ++lane) sum += value[lane];
  return sum;
}

}  // namespace
}  // namespace peft_ext
