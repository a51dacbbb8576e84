// Gradients that are summed over chunks of rows, a partial sum for each.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace peft_ext {

// The chunks for factors of `rank`: enough to share among threads, few enough that the partial sums, which go through
// memory, are at most an eighth of x; by the sizes alone, so that a result does not depend on the threads.
inline int64_t count_factor_chunks(int64_t rows, int64_t rank) {
  constexpr int64_t kMinRows = 128, kMaxChunks = 64;
  return std::clamp<int64_t>(std::min(rows / kMinRows, rows / (8 * rank)), 1, kMaxChunks);
}

// total [count] = the sum over the rows of sums [chunks, count], in their order.
template <class C>
void add_chunks(C* total, const C* sums, int64_t chunks, int64_t count) {
  constexpr int64_t kGrain = 32 * 1024;
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    std::copy(sums + begin, sums + end, total + begin);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const C* added = sums + chunk * count;
      for (int64_t i = begin; i < end; ++i) total[i] += added[i];
    }
  });
}

// The sums of one gradient, one of each chunk; undefined where the gradient is not asked for. A single chunk's has the
// gradient's own shape: a view of it would cost a short call more than its arithmetic.
struct ChunkSums {
  ChunkSums(bool needed, int64_t count, at::IntArrayRef shape, const at::TensorOptions& options) : chunks(count) {
    if (!needed) return;
    auto sizes = shape.vec();
    if (chunks > 1) sizes.insert(sizes.begin(), chunks);
    sums = at::empty(sizes, options);
  }

  void* of_chunk(int64_t chunk) const {
    if (!sums.defined()) return nullptr;
    return static_cast<char*>(sums.data_ptr()) + chunk * (sums.numel() / chunks) * sums.element_size();
  }

  // For kernels that add to what is there.
  void clear() const {
    if (!sums.defined()) return;
    constexpr int64_t kGrain = 128 * 1024;
    auto* bytes = static_cast<char*>(sums.data_ptr());
    at::parallel_for(0, static_cast<int64_t>(sums.nbytes()), kGrain,
                     [&](int64_t begin, int64_t end) { std::fill(bytes + begin, bytes + end, 0); });
  }

  // By a loop of our own: what at::sum does before it adds is more code than the caches have left after a large
  // product, 30 us for a factor's 10.
  at::Tensor total() const {
    if (chunks == 1) return sums;
    const at::Tensor total = at::empty(sums.sizes().slice(1), sums.options());
    if (sums.scalar_type() == at::kDouble) {
      add_chunks(total.mutable_data_ptr<double>(), sums.const_data_ptr<double>(), chunks, total.numel());
    } else {
      add_chunks(total.mutable_data_ptr<float>(), sums.const_data_ptr<float>(), chunks, total.numel());
    }
    return total;
  }

  int64_t chunks;
  at::Tensor sums;
};

}  // namespace peft_ext
