// Reading and writing a few neighbouring elements, and what the kernels of several ops sum in.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "common/checks.h"
#include "cuda/launch.h"

namespace peft_ext::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// What values of T are computed and summed in.
template <class T>
using Acc = typename AccOf<T>::type;

constexpr int64_t kVectorBytes = 16;  // The widest access of a thread.

template <class T, int kCount>
struct VectorOf {
  static constexpr int kBytes = kCount * sizeof(T) < kVectorBytes ? kCount * sizeof(T) : kVectorBytes;
  static constexpr int kEach = kBytes / sizeof(T);
  struct alignas(kBytes) Piece {
    T values[kEach];
  };
};

// Elements [0, count) from source on; zeros beyond. `aligned`: whole vectors may be read.
template <int kCount, class T, class C>
__device__ inline void load_elements(C (&target)[kCount], const T* source, int64_t count, bool aligned) {
  using Vector = VectorOf<T, kCount>;
  if (aligned && count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount / Vector::kEach; ++i) {
      const auto piece = reinterpret_cast<const typename Vector::Piece*>(source)[i];
#pragma unroll
      for (int j = 0; j < Vector::kEach; ++j) target[i * Vector::kEach + j] = static_cast<C>(piece.values[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) target[i] = i < count ? static_cast<C>(source[i]) : C(0);
}

// kCount elements by vectors, without a look at anything: only between such loads is there no branch, at which each
// would wait for the one before.
template <int kCount, class T>
__device__ inline void load_whole(T (&target)[kCount], const T* source) {
  load_elements(target, source, kCount, true);
}

// Elements [0, count) from target on, rounded to T.
template <int kCount, class T, class C>
__device__ inline void store_elements(T* target, const C (&source)[kCount], int64_t count, bool aligned) {
  using Vector = VectorOf<T, kCount>;
  if (aligned && count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount / Vector::kEach; ++i) {
      typename Vector::Piece piece;
#pragma unroll
      for (int j = 0; j < Vector::kEach; ++j) piece.values[j] = static_cast<T>(source[i * Vector::kEach + j]);
      reinterpret_cast<typename Vector::Piece*>(target)[i] = piece;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) target[i] = static_cast<T>(source[i]);
  }
}

// The sum over a warp, in all of its lanes.
template <class C>
__device__ inline C warp_sum(C value) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  return value;
}

template <class C>
__device__ inline C warp_max(C value) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) {
    const C other = __shfl_xor_sync(0xffffffffu, value, bit);
    value = value < other ? other : value;
  }
  return value;
}

// Whether rows `stride` elements apart may be read and written by vectors of `elements`.
inline bool is_aligned(const at::Tensor& tensor, int64_t stride, int64_t elements) {
  const int64_t bytes = std::min<int64_t>(elements * tensor.element_size(), kVectorBytes);
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0 &&
         stride * tensor.element_size() % bytes == 0;
}

// Calls work(T{}) for the storage type.
template <class Work>
void dispatch_storage(at::ScalarType type, const Work& work) {
  switch (type) {
    case at::kFloat:
      return work(float{});
    case at::kDouble:
      return work(double{});
    case at::kBFloat16:
      return work(c10::BFloat16{});
    case at::kHalf:
      return work(c10::Half{});
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", type);
  }
}

// Calls work(T{}, F{}) for the storage type and that of a tensor which is of T or of its accumulation type.
template <class Work>
void dispatch_pair(at::ScalarType type, at::ScalarType other, const Work& work) {
  dispatch_storage(type, [&](auto t) {
    using T = decltype(t);
    if (other == type) return work(t, t);
    work(t, Acc<T>{});
  });
}

}  // namespace peft_ext::cuda
