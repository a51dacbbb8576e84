// Sizes of grids and blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace peft_ext::cuda {

constexpr int kWarp = 32;

// ceil(a / b) of what is not negative.
constexpr int64_t blocks_for(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// One dimension of a grid. Kernels that may have more work than this loop over it in steps of gridDim.
inline unsigned grid_size(int64_t blocks, int64_t limit = std::numeric_limits<int32_t>::max()) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, limit));
}

}  // namespace peft_ext::cuda
