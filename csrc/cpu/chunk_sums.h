// Gradients that are summed over chunks of rows, a partial sum for each.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace peft_ext {

// The chunks for factors of `rank`: enough to share among threads, few enough that the partial sums stay small beside
// x; by the sizes alone, so that a result does not depend on the threads.
inline int64_t count_factor_chunks(int64_t rows, int64_t rank) {
  constexpr int64_t kMinRows = 128, kMaxChunks = 64;
  return std::clamp<int64_t>(std::min(rows / kMinRows, rows / (4 * rank)), 1, kMaxChunks);
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

  at::Tensor total() const { return chunks == 1 ? sums : sums.sum(0); }

  int64_t chunks;
  at::Tensor sums;
};

}  // namespace peft_ext
