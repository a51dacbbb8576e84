// adapter_fusion on the device: a warp a row, one pass over the adapters' outputs where they lie. The keys' projection
// is folded into the query, as on the CPU; the formulas are those of cpu/kernels/adapter_fusion.h.
//
// Types   all sums in the accumulation type (float; double for double); the query may be of it or of the storage type.
// Reading a row of all outputs is read twice, the second time from the caches.
// Order   of sums: by the sizes alone. The gradient of one query for all rows is summed over chunks of rows by a second
//         kernel, from the scores' gradients that the first one writes.
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/fusion_checks.h"
#include "common/tensors.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int kMostAdapters = 128;  // Their pointers are an argument of the kernels.
constexpr int kWarps = 4, kVector = 8;

struct Fusion {
  const void* outputs[kMostAdapters];
  int64_t strides[kMostAdapters];
  int adapters;
  int64_t rows, columns;
  double scale;
  const void* query;
  int64_t query_stride;  // 0: one query for all rows.
  void* weights;         // [rows, adapters] of the accumulation type.
  bool aligned;
};

struct FusionGrads {
  void* outputs[kMostAdapters];  // Each may be null.
  const void* mix;               // Null counts as 0.
  int64_t mix_stride;
  const void* weights;  // Null counts as 0; [rows, adapters].
  void* query;          // [rows, columns], or null.
  void* scores;         // [rows, adapters] of the accumulation type.
  bool aligned;
};

template <class T>
__device__ inline const T* output_row(const Fusion& p, int adapter, int64_t row) {
  return static_cast<const T*>(p.outputs[adapter]) + row * p.strides[adapter];
}

// The product of two rows, in all lanes.
template <class A, class B, class C = Acc<A>>
__device__ inline C row_product(const A* a, const B* b, int64_t columns, int lane, bool aligned) {
  C sum = 0;
  for (int64_t k = lane * kVector; k < columns; k += kWarp * kVector) {
    C left[kVector], right[kVector];
    load_elements(left, a + k, columns - k, aligned);
    load_elements(right, b + k, columns - k, aligned);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += left[i] * right[i];
  }
  return warp_sum(sum);
}

// scores: one value an adapter, the same in all lanes' eyes, in shared memory.
template <class T, class Q>
__global__ void __launch_bounds__(kWarps* kWarp) fuse(const __grid_constant__ Fusion p, T* mix) {
  using C = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  C* scores = reinterpret_cast<C*>(shared) + warp * p.adapters;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= p.rows) return;
  const Q* query = static_cast<const Q*>(p.query) + row * p.query_stride;
  for (int a = 0; a < p.adapters; ++a) {
    const C score = row_product(output_row<T>(p, a, row), query, p.columns, lane, p.aligned);
    if (lane == 0) scores[a] = static_cast<C>(p.scale) * score;
  }
  __syncwarp();
  C most = scores[0], total = 0;
  for (int a = 1; a < p.adapters; ++a) most = scores[a] > most ? scores[a] : most;
  for (int a = 0; a < p.adapters; ++a) total += exp(scores[a] - most);
  __syncwarp();
  for (int a = lane; a < p.adapters; a += kWarp) {
    scores[a] = exp(scores[a] - most) / total;
    static_cast<C*>(p.weights)[row * p.adapters + a] = scores[a];
  }
  __syncwarp();
  for (int64_t k = lane * kVector; k < p.columns; k += kWarp * kVector) {
    C sums[kVector] = {};
    for (int a = 0; a < p.adapters; ++a) {
      C values[kVector];
      load_elements(values, output_row<T>(p, a, row) + k, p.columns - k, p.aligned);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += scores[a] * values[i];
    }
    store_elements(mix + row * p.columns + k, sums, p.columns - k, p.aligned);
  }
}

template <class T, class Q>
__global__ void __launch_bounds__(kWarps* kWarp)
    fuse_backward(const __grid_constant__ Fusion p, const __grid_constant__ FusionGrads grads) {
  using C = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  C* scores = reinterpret_cast<C*>(shared) + warp * p.adapters;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= p.rows) return;
  const C* weights = static_cast<const C*>(p.weights) + row * p.adapters;
  const T* grad_mix = grads.mix ? static_cast<const T*>(grads.mix) + row * grads.mix_stride : nullptr;
  C total = 0;
  for (int a = 0; a < p.adapters; ++a) {
    C grad = grads.weights ? static_cast<const C*>(grads.weights)[row * p.adapters + a] : C(0);
    if (grad_mix) grad += row_product(output_row<T>(p, a, row), grad_mix, p.columns, lane, p.aligned && grads.aligned);
    if (lane == 0) scores[a] = grad;
    total += weights[a] * grad;
  }
  __syncwarp();
  for (int a = lane; a < p.adapters; a += kWarp) {
    scores[a] = static_cast<C>(p.scale) * weights[a] * (scores[a] - total);
    static_cast<C*>(grads.scores)[row * p.adapters + a] = scores[a];
  }
  __syncwarp();
  const Q* query = static_cast<const Q*>(p.query) + row * p.query_stride;
  for (int64_t k = lane * kVector; k < p.columns; k += kWarp * kVector) {
    const int64_t left = p.columns - k;
    C mix[kVector] = {}, queries[kVector], query_sums[kVector] = {};
    if (grad_mix) load_elements(mix, grad_mix + k, left, grads.aligned);
    load_elements(queries, query + k, left, p.aligned);
    for (int a = 0; a < p.adapters; ++a) {
      if (grads.query) {
        C values[kVector];
        load_elements(values, output_row<T>(p, a, row) + k, left, p.aligned);
#pragma unroll
        for (int i = 0; i < kVector; ++i) query_sums[i] += scores[a] * values[i];
      }
      if (grads.outputs[a]) {
        C values[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = weights[a] * mix[i] + scores[a] * queries[i];
        store_elements(static_cast<T*>(grads.outputs[a]) + row * p.columns + k, values, left, grads.aligned);
      }
    }
    if (grads.query)
      store_elements(static_cast<Q*>(grads.query) + row * p.columns + k, query_sums, left, grads.aligned);
  }
}

constexpr int kSumThreads = 128, kSumBatch = 4;

// sums[chunk, k] = sum over the chunk's rows and all adapters of scores[m, a] z_a[m, k]; blockIdx.y counts the chunks,
// a thread takes eight neighbouring columns, and four adapters' values at a time.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_queries(const __grid_constant__ Fusion p, const Acc<T>* scores, Acc<T>* sums) {
  using C = Acc<T>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kVector;
  if (column >= p.columns) return;
  const int64_t begin = p.rows * blockIdx.y / gridDim.y, end = p.rows * (blockIdx.y + 1) / gridDim.y;
  C sum[kVector] = {};
  for (int64_t row = begin; row < end; ++row) {
    for (int first = 0; first < p.adapters; first += kSumBatch) {
      T values[kSumBatch][kVector];
      C score[kSumBatch];
      if (p.aligned) {  // All of the columns are whole vectors then.
#pragma unroll
        for (int i = 0; i < kSumBatch; ++i) {
          load_whole(values[i], output_row<T>(p, min(first + i, p.adapters - 1), row) + column);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSumBatch; ++i) {
          const T* source = output_row<T>(p, min(first + i, p.adapters - 1), row) + column;
          load_elements(values[i], source, p.columns - column, false);
        }
      }
#pragma unroll
      for (int i = 0; i < kSumBatch; ++i) score[i] = scores[row * p.adapters + min(first + i, p.adapters - 1)];
#pragma unroll
      for (int i = 0; i < kSumBatch; ++i) {
        if (first + i >= p.adapters) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[j] += score[i] * static_cast<C>(values[i][j]);
      }
    }
  }
  store_elements(sums + blockIdx.y * p.columns + column, sum, p.columns - column, p.aligned);
}

// The arguments as the kernels take them; keeps alive what it had to copy.
class Arguments {
 public:
  Arguments(const at::Tensor& query, at::TensorList outputs, const at::Tensor& weights, double scale)
      : query_(query.dim() == 1 ? query.contiguous() : as_rows(query)) {
    const auto count = static_cast<int64_t>(outputs.size());
    TORCH_CHECK_VALUE(count <= kMostAdapters, "outputs must have at most ", kMostAdapters,
                      " adapters on a CUDA device, but has ", count);
    problem.adapters = static_cast<int>(count);
    problem.aligned = is_aligned(query_, query.dim() == 1 ? kVector : query_.stride(0), kVector);
    for (size_t i = 0; i < outputs.size(); ++i) {
      rows_.push_back(as_rows(outputs[i]));
      problem.outputs[i] = rows_[i].const_data_ptr();
      problem.strides[i] = rows_[i].stride(0);
      problem.aligned = problem.aligned && is_aligned(rows_[i], rows_[i].stride(0), kVector);
    }
    problem.rows = rows_[0].size(0);
    problem.columns = rows_[0].size(1);
    problem.aligned = problem.aligned && problem.columns % kVector == 0;  // The results' rows.
    problem.scale = scale;
    problem.query = query_.const_data_ptr();
    problem.query_stride = query.dim() == 1 ? 0 : query_.stride(0);
    problem.weights = weights.data_ptr();
    shared = static_cast<size_t>(kWarps * count * weights.element_size());
    grid = dim3(grid_size(blocks_for(problem.rows, kWarps)));
  }

  Fusion problem{};
  dim3 grid;
  size_t shared;

 private:
  at::Tensor query_;
  std::vector<at::Tensor> rows_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> adapter_fusion(const at::Tensor& query, at::TensorList outputs,
                                                              const OptionalTensor& key_weight,
                                                              const OptionalTensor& key_bias, double scale) {
  check_fusion(query, outputs, key_weight, key_bias, scale);
  const c10::cuda::CUDAGuard guard(query.device());
  const at::Tensor kept = key_weight ? at::matmul(query, *key_weight) : at::empty({0}, query.options());
  const at::Tensor& folded_query = key_weight ? kept : query;
  const auto weights_shape = with_last_size(outputs[0].sizes(), static_cast<int64_t>(outputs.size()));
  const at::Tensor mix = at::empty(outputs[0].sizes(), outputs[0].options());
  const at::Tensor weights = at::empty(weights_shape, mix.options().dtype(acc_type(mix.scalar_type())));
  if (mix.numel() == 0 && weights.numel() == 0) return {mix, weights, kept};
  const Arguments arguments(folded_query, outputs, weights, scale);
  dispatch_pair(mix.scalar_type(), query.scalar_type(), [&](auto t, auto q) {
    using T = decltype(t);
    launch(fuse<T, decltype(q)>, arguments.grid, dim3(kWarps * kWarp), arguments.shared, arguments.problem,
           mix.data_ptr<T>());
  });
  return {mix, weights, kept};
}

// The gradient of one query for all rows.
at::Tensor sum_scores(const Arguments& arguments, const at::Tensor& scores, const at::Tensor& like) {
  const Fusion& problem = arguments.problem;
  constexpr int64_t kBlocks = 528, kLeastRows = 8;
  const int64_t column_blocks = blocks_for(problem.columns, kSumThreads * kVector);
  const int64_t chunks = std::clamp<int64_t>(kBlocks / std::max<int64_t>(column_blocks, 1), 1,
                                             std::max<int64_t>(problem.rows / kLeastRows, 1));
  const at::Tensor sums = at::empty({chunks, problem.columns}, scores.options());
  if (problem.columns > 0) {
    dispatch_storage(like.scalar_type(), [&](auto t) {
      using C = Acc<decltype(t)>;
      launch(sum_queries<decltype(t)>, dim3(grid_size(column_blocks), grid_size(chunks)), dim3(kSumThreads), 0, problem,
             scores.const_data_ptr<C>(), sums.data_ptr<C>());
    });
  }
  return at::sum(sums, at::IntArrayRef{0});
}

std::vector<at::Tensor> adapter_fusion_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                                const at::Tensor& folded_query, at::TensorList outputs,
                                                const at::Tensor& weights, double scale, bool needs_query,
                                                const c10::List<bool>& needs_outputs) {
  check_fusion(folded_query, outputs, std::nullopt, std::nullopt, scale);
  check_fusion_saved(grad_mix, grad_weights, outputs, weights, needs_outputs);
  const c10::cuda::CUDAGuard guard(folded_query.device());
  const at::Tensor saved_weights = weights.contiguous();
  const Arguments arguments(folded_query, outputs, saved_weights, scale);
  const bool one_query = folded_query.dim() == 1;

  std::vector<at::Tensor> result;
  FusionGrads grads{};
  grads.aligned = arguments.problem.columns % kVector == 0;
  at::Tensor grad_mix_rows, grad_weight_rows;
  if (grad_mix) {
    grad_mix_rows = as_rows(*grad_mix);
    grads.mix = grad_mix_rows.const_data_ptr();
    grads.mix_stride = grad_mix_rows.stride(0);
    grads.aligned = grads.aligned && is_aligned(grad_mix_rows, grads.mix_stride, kVector);
  }
  if (grad_weights) {
    grad_weight_rows = grad_weights->contiguous();
    grads.weights = grad_weight_rows.const_data_ptr();
  }
  if (needs_query && !one_query) {
    result.push_back(at::empty(folded_query.sizes(), folded_query.options()));
    grads.query = result.back().data_ptr();
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!needs_outputs[i]) continue;
    result.push_back(at::empty(outputs[i].sizes(), outputs[i].options()));
    grads.outputs[i] = result.back().data_ptr();
  }
  const at::Tensor scores = at::empty({arguments.problem.rows, arguments.problem.adapters}, saved_weights.options());
  grads.scores = scores.data_ptr();
  if (arguments.problem.rows > 0) {
    dispatch_pair(outputs[0].scalar_type(), folded_query.scalar_type(), [&](auto t, auto q) {
      launch(fuse_backward<decltype(t), decltype(q)>, arguments.grid, dim3(kWarps * kWarp), arguments.shared,
             arguments.problem, grads);
    });
  }
  if (needs_query && one_query) {
    result.insert(result.begin(), sum_scores(arguments, scores, outputs[0]).to(folded_query.scalar_type()));
  }
  return result;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("adapter_fusion", adapter_fusion);
  m.impl("adapter_fusion_backward", adapter_fusion_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
