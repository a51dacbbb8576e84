// W = round(W' - D) in place, corrected by the residual; then the outliers are put back. The host waits for their
// number, which must be that of the marks in the residual.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/lora_checks.h"
#include "cuda/lora_delta.h"

namespace peft_ext::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kDeltaThreads) subtract_delta(const __grid_constant__ DeltaProblem p) {
  using C = Acc<T>;
  using I = Bits<T>;
  using U = std::make_unsigned_t<I>;
  for_each_element<T, Writes::kWeight, true>(p, [](T& weight, C delta, int8_t residual) {
    const T recovered = static_cast<T>(static_cast<C>(weight) - delta);
    const I got = flip_negative(bits_as<I>(recovered)), distance = residual;
    weight = bits_as<T>(flip_negative(static_cast<I>(static_cast<U>(static_cast<U>(got) + static_cast<U>(distance)))));
  });
}

void lora_unmerge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                   const at::Tensor& outliers, double scaling) {
  check_lora_merge(weight, lora_A, lora_B, scaling);
  check_residual(weight, residual, outliers);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor places = residual.eq(kOutlier).nonzero();
  TORCH_CHECK_VALUE(outliers.numel() == places.size(0), "outliers must have the ", places.size(0),
                    " elements that residual marks, but has ", outliers.numel());
  const LoraDelta delta(weight, lora_A, lora_B, scaling);
  const at::Tensor distances = (delta.transposed ? residual.t() : residual).contiguous();
  dispatch_storage(weight.scalar_type(), [&](auto t) { delta.run(subtract_delta<decltype(t)>, distances); });
  if (!delta.matrix.is_alias_of(weight)) weight.copy_(delta.matrix);
  if (places.size(0) == 0) return;
  // As bits: indexing may compute in float, which rewrites a NaN of half precision.
  const at::ScalarType bits = weight.element_size() == 2   ? at::kShort
                              : weight.element_size() == 4 ? at::kInt
                                                           : at::kLong;
  weight.view(bits).index_put_({places.select(1, 0), places.select(1, 1)}, outliers.view(bits));
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("lora_unmerge_", lora_unmerge_);
}

}  // namespace
}  // namespace peft_ext::cuda
