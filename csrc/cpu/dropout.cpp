#include "cpu/dropout.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>
#include <mutex>

namespace peft_ext {

at::Tensor draw_seed() {
  constexpr int64_t kLow = std::numeric_limits<int64_t>::min(), kHigh = std::numeric_limits<int64_t>::max();
  // A mode, a transform or a tracer has to see the op.
  const bool is_plain = (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
  if (!is_plain) return at::randint(kLow, kHigh, {1}, at::kLong);
  // What at::randint does: on its way there is more code than the caches have left after a large product.
  const at::Tensor seed = at::detail::empty_cpu({1}, at::kLong);
  at::uniform_int_from_to_distribution<int64_t> distribution(static_cast<uint64_t>(kHigh) - kLow, kLow);
  at::CPUGeneratorImpl* generator = at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>();
  std::lock_guard<std::mutex> lock(generator->mutex_);
  *seed.data_ptr<int64_t>() = distribution(generator);
  return seed;
}

}  // namespace peft_ext
