// W = round(W' - D) in place, corrected by the residual; then the outliers are put back. The host waits for their
// number, which must be that of the marks in the residual.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "common/lora_checks.h"
#include "cuda/lora_delta.h"

namespace peft_ext::cuda {
namespace {

template <class T>
__global__ void subtract_delta(DeltaProblem p) {
  using C = Acc<T>;
  using I = Bits<T>;
  using U = std::make_unsigned_t<I>;
  const int64_t row = blockIdx.x;
  for (int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; column < p.columns;
       column += static_cast<int64_t>(gridDim.y) * blockDim.x) {
    T& weight = static_cast<T*>(p.weight)[row * p.row_stride + column];
    const T recovered = static_cast<T>(static_cast<C>(weight) - delta_at<C>(p, row, column));
    const I got = flip_negative(bits_as<I>(recovered));
    const I distance = p.residual[row * p.columns + column];
    weight = bits_as<T>(flip_negative(static_cast<I>(static_cast<U>(static_cast<U>(got) + static_cast<U>(distance)))));
  }
}

void lora_unmerge_(at::Tensor weight, const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& residual,
                   const at::Tensor& outliers, double scaling) {
  check_lora_merge(weight, lora_A, lora_B, scaling);
  check_residual(weight, residual, outliers);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor marked = residual.eq(kOutlier);
  const int64_t count = marked.sum().item<int64_t>();
  TORCH_CHECK_VALUE(outliers.numel() == count, "outliers must have the ", count,
                    " elements that residual marks, but has ", outliers.numel());
  const LoraDelta delta(weight, lora_A, lora_B, scaling);
  const at::Tensor distances = (delta.transposed ? residual.t() : residual).contiguous();
  dispatch_storage(weight.scalar_type(), [&](auto t) { delta.run(subtract_delta<decltype(t)>, distances); });
  if (!delta.matrix.is_alias_of(weight)) weight.copy_(delta.matrix);
  if (count > 0) weight.masked_scatter_(marked, outliers);
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("lora_unmerge_", lora_unmerge_);
}

}  // namespace
}  // namespace peft_ext::cuda
