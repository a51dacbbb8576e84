// The adapters' activations and their derivatives on vectors: float32 by polynomials, with errors of a few units in
// the last place of 1, float64 by libm one lane at a time.
#pragma once

#include "common/activation.h"
#include "vec.h"

namespace peft_ext {

namespace {

// The callers' vectors are of the lanes of Vec, so that one template serves all instruction sets.
inline Vec<float> exp(Vec<float> x) {
  // Cephes: 2**n e**r with |r| <= ln(2) / 2. The clamp keeps 2**n a normal number.
  const Vec<float> zero = {};
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 88.0f ? zero + 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer.
  const Vec<float> n = (x * 1.44269504088896341f + kRound) - kRound;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int32Vec exponent = (__builtin_convertvector(n, Int32Vec) + 127) << 23;
  return p * bit_cast<Vec<float>>(exponent);
}

inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> z = x * x;
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> small = p * z * x + x;
  const Vec<float> large = 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
  return z < 0.390625f ? small : large;
}

// The normal distribution's mass below x, given e**(-x**2 / 2).
inline Vec<float> normal_cdf(Vec<float> x, Vec<float> bell) {
  // Abramowitz and Stegun 7.1.26, with an absolute error below 2e-7.
  constexpr float kSqrtHalf = 0.70710678118654752440f;
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (0.3275911f * kSqrtHalf * magnitude + 1.0f);
  Vec<float> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec<float> tail = 0.5f * p * t * bell;
  return x < 0.0f ? tail : 1.0f - tail;
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}
inline Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * x[i]);
  return x;
}

// act(x), and its derivative where `derivative` is not null.
template <Activation kKind, class C>
inline Vec<C> activate(Vec<C> x, Vec<C>* derivative) {
  const Vec<C> zero = {};
  if constexpr (kKind == Activation::kRelu) {
    // NaN stays NaN, as in torch.
    if (derivative) *derivative = x <= C(0) ? zero : zero + C(1);
    return x <= C(0) ? zero : x;
  } else if constexpr (kKind == Activation::kGelu) {
    constexpr C kDensity = C(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const Vec<C> bell = exp(C(-0.5) * x * x), cdf = normal_cdf(x, bell);
    if (derivative) *derivative = cdf + x * kDensity * bell;
    return x * cdf;
  } else if constexpr (kKind == Activation::kGeluNew) {
    constexpr C kScale = C(0.79788456080286535588), kCube = C(0.044715);  // sqrt(2 / pi)
    const Vec<C> t = tanh(kScale * (x + kCube * x * x * x));
    if (derivative) {
      *derivative = C(0.5) * (C(1) + t) + C(0.5) * x * (C(1) - t * t) * kScale * (C(1) + C(3) * kCube * x * x);
    }
    return C(0.5) * x * (C(1) + t);
  } else if constexpr (kKind == Activation::kSilu) {
    const Vec<C> sigmoid = C(1) / (exp(-x) + C(1));
    if (derivative) *derivative = sigmoid * (C(1) + x * (C(1) - sigmoid));
    return x * sigmoid;
  } else {
    const Vec<C> t = tanh(x);
    if (derivative) *derivative = C(1) - t * t;
    return t;
  }
}

}  // namespace
}  // namespace peft_ext
