// csrc/cuda/launch.h, for kernels that are plain functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

namespace peft_ext::cuda {

constexpr int kWarp = 32;

constexpr int64_t blocks_for(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline unsigned grid_size(int64_t blocks, int64_t limit = std::numeric_limits<int32_t>::max()) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, limit));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  cuda_emulation::run(grid, block, shared, [&] { std::apply(kernel, values); });
}

}  // namespace peft_ext::cuda
