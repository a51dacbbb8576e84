// csrc/cuda/launch.h, for kernels that are plain functions.
#pragma once

#include <tuple>

#include "cuda/grid.h"

namespace peft_ext::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  cuda_emulation::run(grid, block, shared, [&] { std::apply(kernel, values); });
}

}  // namespace peft_ext::cuda
