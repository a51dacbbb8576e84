// The language of CUDA kernels as C++ on the CPU: included before everything else.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_emulation {

enum class Wait { kNone, kBlock, kWarp, kEnd };

struct Fiber {
  void* stack_pointer = nullptr;
  dim3 thread;
  int lane = 0, warp = 0;
  Wait wait = Wait::kNone;
  int parity = 0;  // Which half of the exchange the next warp operation writes: the other may still be read.
};

struct Grid {
  dim3 block, block_dim, grid_dim;
  Fiber* current = nullptr;
  std::vector<std::vector<uint64_t>> exchange;  // For each warp, two halves of 32 values.
  unsigned char* shared = nullptr;
};

extern Grid grid;

void wait_for(Wait wait);
void run(dim3 grid_dim, dim3 block_dim, size_t shared_bytes, const std::function<void()>& kernel);
[[noreturn]] void fail(const char* what);

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a mask of less than the warp is not emulated");
}

// Gives every lane's value to read(all values).
template <class Read>
auto exchange(uint64_t value, const Read& read) {
  Fiber& me = *grid.current;
  me.parity ^= 1;
  uint64_t* half = grid.exchange[me.warp].data() + 32 * me.parity;
  half[me.lane] = value;
  wait_for(Wait::kWarp);
  return read(half);
}

template <class T>
T value_of_lane(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, [&](const uint64_t* all) { return all[source]; });
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

#define threadIdx (::cuda_emulation::grid.current->thread)
#define blockIdx (::cuda_emulation::grid.block)
#define blockDim (::cuda_emulation::grid.block_dim)
#define gridDim (::cuda_emulation::grid.grid_dim)

inline void __syncthreads() {
  cuda_emulation::wait_for(cuda_emulation::Wait::kBlock);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::check_mask(mask);
  cuda_emulation::wait_for(cuda_emulation::Wait::kWarp);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  cuda_emulation::check_mask(mask);
  return cuda_emulation::value_of_lane(value, source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  cuda_emulation::check_mask(mask);
  return cuda_emulation::value_of_lane(value, cuda_emulation::grid.current->lane ^ bits);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  cuda_emulation::check_mask(mask);
  const int lane = cuda_emulation::grid.current->lane, source = lane + static_cast<int>(by);
  return cuda_emulation::value_of_lane(value, source < 32 ? source : lane);
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  cuda_emulation::check_mask(mask);
  return cuda_emulation::exchange(vote != 0, [](const uint64_t* all) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(all[lane]) << lane;
    return votes;
  });
}

inline int __any_sync(unsigned mask, int vote) {
  return __ballot_sync(mask, vote) != 0;
}

inline int __all_sync(unsigned mask, int vote) {
  return __ballot_sync(mask, vote) == 0xffffffffu;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

template <class T>
T __ldg(const T* source) {
  return *source;
}

// Of integers alone: sums of floats would depend on the order of the threads.
template <class T>
T atomicAdd(T* target, T value) {
  static_assert(std::is_integral_v<T>);
  const T before = *target;
  *target += value;
  return before;
}

inline float rsqrt(float x) {
  return 1.0f / std::sqrt(x);
}

inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}

inline float rsqrtf(float x) {
  return rsqrt(x);
}

inline float __expf(float x) {
  return std::exp(x);
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
