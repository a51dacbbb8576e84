// Launching a kernel on the current stream of the current device.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

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

// kernel<<<grid, block, shared bytes>>>(arguments...), with an error at once if it cannot start.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) {
  constexpr size_t kAlwaysThere = 48 << 10;
  if (shared > kAlwaysThere) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  kernel<<<grid, block, shared, c10::cuda::getCurrentCUDAStream()>>>(static_cast<Parameters>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace peft_ext::cuda
