// W' = round(W + D) in place, and what round(W' - D) misses of W. Two passes, one for the residual and one for the
// weight: the outliers, whose number the host has to wait for, are taken from the weight in between.
#include <ATen/ops/empty.h>
#include <ATen/ops/masked_select.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/lora_checks.h"
#include "cuda/lora_delta.h"

namespace peft_ext::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) find_residual(const __grid_constant__ DeltaProblem p) {
  using C = Acc<T>;
  using I = Bits<T>;
  using U = std::make_unsigned_t<I>;
  for_each_element<T, Writes::kResidual, false>(p, [](T weight, C delta, int8_t& residual) {
    const T merged = static_cast<T>(static_cast<C>(weight) + delta);
    const T recovered = static_cast<T>(static_cast<C>(merged) - delta);
    const I wanted = flip_negative(bits_as<I>(weight)), got = flip_negative(bits_as<I>(recovered));
    const I distance = static_cast<I>(static_cast<U>(static_cast<U>(wanted) - static_cast<U>(got)));
    const bool is_number = static_cast<C>(recovered) == static_cast<C>(recovered);
    const bool fits = distance > kOutlier && distance < -kOutlier && is_number;
    residual = fits ? static_cast<int8_t>(distance) : kOutlier;
  });
}

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) add_delta(const __grid_constant__ DeltaProblem p) {
  using C = Acc<T>;
  for_each_element<T, Writes::kWeight, false>(
      p, [](T& weight, C delta, int8_t) { weight = static_cast<T>(static_cast<C>(weight) + delta); });
}

std::tuple<at::Tensor, at::Tensor> lora_merge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                                               double scaling) {
  check_lora_merge(weight, lora_A, lora_B, scaling);
  const c10::cuda::CUDAGuard guard(weight.device());
  const LoraDelta delta(weight, lora_A, lora_B, scaling);
  const at::Tensor distances = at::empty(delta.matrix.sizes(), weight.options().dtype(at::kChar));
  const at::Tensor residual = delta.transposed ? distances.t() : distances;
  dispatch_storage(weight.scalar_type(), [&](auto t) { delta.run(find_residual<decltype(t)>, distances); });
  const at::Tensor outliers = at::masked_select(weight, residual.eq(kOutlier));
  dispatch_storage(weight.scalar_type(), [&](auto t) { delta.run(add_delta<decltype(t)>, distances); });
  if (!delta.matrix.is_alias_of(weight)) weight.copy_(delta.matrix);
  return {residual, outliers};
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("lora_merge_", lora_merge_);
}

}  // namespace
}  // namespace peft_ext::cuda
