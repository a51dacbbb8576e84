// Counter-based dropout on the device: the definition of cpu/kernels/dropout.h and peft_ext/reference/dropout.py,
// a pure function of (seed, row, column). The seed stays on the device, so that a captured graph draws a new mask
// for every new value of the seed tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "common/dropout.h"

namespace peft_ext::cuda {

constexpr int kColumnsPerBlock = 8, kPhiloxRounds = 7;

// As the kernels take it. threshold 0 keeps everything; seed is read on the device.
struct DeviceDropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  double scale = 1.0;  // Of the kept elements.
};

inline DeviceDropout make_device_dropout(double p, const std::optional<at::Tensor>& seed) {
  DeviceDropout dropout;
  const DropoutRate rate(p);
  dropout.threshold = rate.threshold;
  dropout.scale = rate.scale;
  if (rate.threshold != 0) dropout.seed = seed->const_data_ptr<int64_t>();
  return dropout;
}

#ifdef __CUDACC__
// Which of the eight columns from 8 * block on are kept in this row: bit i is column 8 * block + i.
__device__ inline uint32_t keep_bits(uint64_t seed, uint32_t threshold, uint64_t row, uint32_t block) {
  uint32_t c0 = block, c1 = 0, c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[] = {c0, c1, c2, c3};
  uint32_t bits = 0;
#pragma unroll
  for (int half = 0; half < kColumnsPerBlock; ++half) {
    const uint32_t value = words[half / 2] >> (16 * (half % 2)) & 0xffffu;
    bits |= static_cast<uint32_t>(value >= threshold) << half;
  }
  return bits;
}
#endif

}  // namespace peft_ext::cuda
