#pragma once

#include <cmath>
#include <cstdint>

namespace peft_ext {

// A probability as the kernels take it (peft_ext/reference/dropout.py): rounded to a multiple of 2**-16, the scale of
// the kept elements too.
struct DropoutRate {
  explicit DropoutRate(double p) : threshold(static_cast<uint32_t>(std::lrint(p * 65536.0))) {
    if (threshold == 0) return;
    const uint32_t kept = 65536 - threshold;
    scale = kept ? 65536.0 / kept : 0.0;
  }

  uint32_t threshold;  // 0 keeps everything.
  double scale = 1.0;
};

}  // namespace peft_ext
