// A quantized frozen weight on the device; formula, shapes and layout: cpu/kernels/quantized_linear.h.
//
//   dequantize   w[n, k] = scale[n, k / group] value[n, k], a thread eight neighbouring columns
//   multiply     y[m, n] = sum_k x[m, k] w[n, k] + bias[n], or + y[m, n], for few rows of x: a warp two rows of w, a
//                lane sixteen bytes of each at a time
//
// Types     Computed and summed in the accumulation type. dequantize rounds w to the storage type once; multiply leaves
//           it unrounded, and rounds y once.
// Which     multiply reads a quarter (an eighth) of what the dense weight takes in float, and nothing else that counts:
//           for few rows it is worth more than writing and reading a dense weight for a GEMM.
#include "cuda/quantized_weight.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <cstdint>
#include <type_traits>

#include "common/quantized_checks.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

// The weight as the kernels take it: rows are contiguous.
struct Quantized {
  const void* values;
  const float* scale;
  int64_t rows, columns, groups;
};

constexpr int kThreads = 256, kVector = 8;

template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    dequantize(const __grid_constant__ Quantized p, T* target, bool values_aligned, bool target_aligned) {
  using C = Acc<T>;
  using Stored = std::conditional_t<kPacked, uint8_t, int8_t>;
  const int64_t pieces = (p.columns + kVector - 1) / kVector, group = p.columns / p.groups;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * pieces;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / pieces, column = i % pieces * kVector, left = p.columns - column;
    constexpr int64_t kBytes = kColumnsPerBlock / 2;
    const int64_t place = kPacked ? row * (p.columns / 2) + column / kColumnsPerBlock * kBytes + column % kBytes
                                  : row * p.columns + column;
    Stored stored[kVector];
    load_elements(stored, static_cast<const Stored*>(p.values) + place, left, values_aligned);
    const C scale = static_cast<C>(p.scale[row * p.groups + column / group]);
    const int shift = column % kColumnsPerBlock < kBytes ? 0 : 4;
    C values[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      values[j] = scale * static_cast<C>(kPacked ? (stored[j] >> shift & 15) - 8 : static_cast<int>(stored[j]));
    }
    store_elements(target + row * p.columns + column, values, left, target_aligned);
  }
}

struct Product {
  Quantized weight;
  const void* x;
  int64_t x_stride, rows;
  const void* bias;  // Null for none; read only where y is overwritten.
  void* y;           // [rows, weight.rows], contiguous.
  bool overwrite;
};

constexpr int kWarps = 4, kOutputs = 2, kPieceBytes = 16;

template <class T, bool kPacked, int kRows>
__global__ void __launch_bounds__(kWarps* kWarp) multiply(const __grid_constant__ Product p) {
  using C = Acc<T>;
  using Stored = std::conditional_t<kPacked, uint8_t, int8_t>;
  struct alignas(kPieceBytes) Piece {
    Stored bytes[kPieceBytes];
  };
  // The columns of a piece are two runs of neighbours where a byte holds two values.
  constexpr int kRun = kPieceBytes, kRuns = kPacked ? 2 : 1, kPieceColumns = kRun * kRuns;
  const Quantized& w = p.weight;
  const int lane = threadIdx.x % kWarp;
  const int64_t first_output = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kOutputs;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows, group = w.columns / w.groups;
  if (first_output >= w.rows) return;

  C sums[kRows][kOutputs] = {};
#pragma unroll 2
  for (int64_t k = lane * kPieceColumns; k < w.columns; k += kWarp * kPieceColumns) {
    Piece pieces[kOutputs];
    C scales[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t output = min(first_output + o, w.rows - 1);
      const Stored* source = static_cast<const Stored*>(w.values) + output * (w.columns / kRuns) + k / kRuns;
      pieces[o] = *reinterpret_cast<const Piece*>(source);
      scales[o] = static_cast<C>(w.scale[output * w.groups + k / group]);
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      C values[kOutputs][kRun];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int byte = pieces[o].bytes[i];
          values[o][i] = scales[o] * static_cast<C>(kPacked ? (byte >> 4 * run & 15) - 8 : byte);
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int64_t row = min(first_row + m, p.rows - 1);
        T x[kRun];
        load_elements(x, static_cast<const T*>(p.x) + row * p.x_stride + k + run * kRun, kRun, true);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) sums[m][o] += static_cast<C>(x[i]) * values[o][i];
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const C sum = warp_sum(sums[m][o]);
      const int64_t row = first_row + m, output = first_output + o;
      if (lane > 0 || row >= p.rows || output >= w.rows) continue;
      T* y = static_cast<T*>(p.y) + row * w.rows + output;
      const C begin = !p.overwrite ? static_cast<C>(*y)
                      : p.bias     ? static_cast<C>(static_cast<const T*>(p.bias)[output])
                                   : C(0);
      *y = static_cast<T>(begin + sum);
    }
  }
}

Quantized as_kernels_take(const at::Tensor& weight, const at::Tensor& scale) {
  return {weight.const_data_ptr(), scale.const_data_ptr<float>(), weight.size(0), in_features_of(weight),
          scale.size(1)};
}

// Whether multiply is the faster way, and can read x and the weight by vectors.
bool multiply_serves(const at::Tensor& x, const at::Tensor& weight) {
  constexpr int64_t kFewRows = 8;
  return x.size(0) <= kFewRows && is_aligned(x, x.stride(0), kPieceBytes) && is_aligned(x, x.size(1), kPieceBytes) &&
         is_aligned(weight, weight.size(1), kPieceBytes);
}

// y [M, out_features], contiguous: = x W^T + b, or += x W^T.
void multiply_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                   const std::optional<at::Tensor>& bias, bool overwrite) {
  if (y.numel() == 0) return;
  const at::Tensor scale = weight_scale.contiguous(), begin = bias ? bias->contiguous() : at::Tensor();
  Product p{as_kernels_take(weight, scale), x.const_data_ptr(), x.stride(0), x.size(0)};
  p.bias = begin.defined() ? begin.const_data_ptr() : nullptr;
  p.y = y.data_ptr();
  p.overwrite = overwrite;
  dispatch_storage(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto rows) {
      constexpr int kRows = rows;
      const dim3 grid(grid_size(blocks_for(weight.size(0), kWarps * kOutputs)), grid_size(blocks_for(p.rows, kRows)));
      launch(is_packed(weight) ? multiply<T, true, kRows> : multiply<T, false, kRows>, grid, dim3(kWarps * kWarp), 0,
             p);
    };
    if (p.rows == 1) return run(std::integral_constant<int, 1>{});
    run(std::integral_constant<int, 8>{});
  });
}

}  // namespace

at::Tensor dequantized(const at::Tensor& weight, const at::Tensor& weight_scale, at::ScalarType type) {
  const at::Tensor values = weight.contiguous(), scale = weight_scale.contiguous();
  const Quantized p = as_kernels_take(values, scale);
  const at::Tensor target = at::empty({p.rows, p.columns}, weight.options().dtype(type));
  if (target.numel() == 0) return target;
  const bool values_aligned = is_aligned(values, values.size(1), kVector),
             target_aligned = is_aligned(target, p.columns, kVector);
  const dim3 grid(grid_size(blocks_for(p.rows * blocks_for(p.columns, kVector), kThreads), 1 << 20));
  dispatch_storage(type, [&](auto t) {
    using T = decltype(t);
    launch(is_packed(weight) ? dequantize<T, true> : dequantize<T, false>, grid, dim3(kThreads), 0, p,
           target.data_ptr<T>(), values_aligned, target_aligned);
  });
  return target;
}

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                         const std::optional<at::Tensor>& bias) {
  if (!weight_scale || !multiply_serves(x, weight)) {
    return at::linear(x, frozen_weight(weight, weight_scale, x.scalar_type()), bias);
  }
  const at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  multiply_into(y, x, weight.contiguous(), *weight_scale, bias, true);
  return y;
}

void add_frozen_product(at::Tensor& y, const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& weight_scale) {
  if (weight_scale && multiply_serves(x, weight)) {
    multiply_into(y, x, weight.contiguous(), *weight_scale, std::nullopt, false);
  } else {
    at::addmm_out(y, y, x, frozen_weight(weight, weight_scale, x.scalar_type()).t());
  }
}

}  // namespace peft_ext::cuda
