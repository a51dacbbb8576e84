// One pass over the adapters' outputs where they lie: neither stacked nor projected. The keys' projection is folded
// into the query, q . (K z + b) = (K^T q) . z + q . b, one product a query instead of one an adapter; q . b is the
// same for all adapters, so the softmax does not see it.
//
// Threads split the rows. The gradient of one query for all rows is summed over a number of row chunks that depends
// on the sizes alone, so that a result does not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>

#include "common/fusion_checks.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kInlineAdapters = 16;
constexpr int64_t kElementsPerTask = 32768;  // Below this a thread costs more than it brings.
constexpr int64_t kRowsPerChunk = 32, kMaxChunks = 64;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The arguments as the kernels take them; keeps alive what it had to copy.
class Arguments {
 public:
  Arguments(const at::Tensor& query, at::TensorList outputs, const at::Tensor& weights, double scale)
      : kernels(fusion_kernels(outputs[0].scalar_type())) {
    for (const auto& output : outputs) {
      outputs_.push_back(as_rows(output));
      pointers_.push_back(outputs_.back().const_data_ptr());
      strides_.push_back(outputs_.back().stride(0));
    }
    query_ = as_rows(query);
    rows = outputs_[0].size(0);
    problem.adapters = static_cast<int64_t>(outputs.size());
    problem.columns = outputs_[0].size(1);
    problem.scale = scale;
    problem.query = query_.const_data_ptr();
    problem.one_query = query.dim() == 1;
    problem.query_stride = problem.one_query ? 0 : query_.stride(0);
    problem.wide_query = query.scalar_type() != outputs[0].scalar_type();
    problem.outputs = pointers_.data();
    problem.output_strides = strides_.data();
    problem.weights = weights.data_ptr();
  }

  // Runs task(begin, end, scratch memory) on ranges of [0, count) that have `row_count` rows each.
  template <class Task>
  void run(int64_t count, int64_t row_count, const Task& task) const {
    const int64_t elements = std::max<int64_t>(1, row_count * problem.adapters * problem.columns);
    at::parallel_for(0, count, divide_up(kElementsPerTask, elements), [&](int64_t begin, int64_t end) {
      c10::SmallVector<double, 2 * kInlineAdapters> memory(divide_up(fusion_workspace(problem.adapters), 8));
      task(begin, end, memory.data());
    });
  }

  const FusionKernels& kernels;
  FusionProblem problem;
  int64_t rows;

 private:
  at::Tensor query_;
  c10::SmallVector<at::Tensor, kInlineAdapters> outputs_;
  c10::SmallVector<const void*, kInlineAdapters> pointers_;
  c10::SmallVector<int64_t, kInlineAdapters> strides_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> adapter_fusion(const at::Tensor& query, at::TensorList outputs,
                                                              const OptionalTensor& key_weight,
                                                              const OptionalTensor& key_bias, double scale) {
  check_fusion(query, outputs, key_weight, key_bias, scale);
  const at::Tensor kept = key_weight ? at::matmul(query, *key_weight) : at::empty({0}, query.options());
  const at::Tensor& folded_query = key_weight ? kept : query;
  const auto weights_shape = with_last_size(outputs[0].sizes(), static_cast<int64_t>(outputs.size()));
  const at::Tensor mix = at::empty(outputs[0].sizes(), outputs[0].options());
  const at::Tensor weights = at::empty(weights_shape, mix.options().dtype(acc_type(mix.scalar_type())));
  const Arguments arguments(folded_query, outputs, weights, scale);
  arguments.run(arguments.rows, 1, [&](int64_t begin, int64_t end, void* memory) {
    arguments.kernels.forward(arguments.problem, mix.data_ptr(), begin, end, memory);
  });
  return {mix, weights, kept};
}

std::vector<at::Tensor> adapter_fusion_backward(const OptionalTensor& grad_mix, const OptionalTensor& grad_weights,
                                                const at::Tensor& folded_query, at::TensorList outputs,
                                                const at::Tensor& weights, double scale, bool needs_query,
                                                const c10::List<bool>& needs_outputs) {
  check_fusion(folded_query, outputs, std::nullopt, std::nullopt, scale);
  check_fusion_saved(grad_mix, grad_weights, outputs, weights, needs_outputs);
  const at::Tensor saved_weights = weights.contiguous();
  const Arguments arguments(folded_query, outputs, saved_weights, scale);
  const int64_t rows = arguments.rows;

  std::vector<at::Tensor> result;
  FusionGradients grads{};
  at::Tensor grad_mix_rows, grad_weight_rows;
  if (grad_mix) {
    grad_mix_rows = as_rows(*grad_mix);
    grads.grad_mix = grad_mix_rows.const_data_ptr();
    grads.grad_mix_stride = grad_mix_rows.stride(0);
  }
  if (grad_weights) {
    grad_weight_rows = grad_weights->contiguous();
    grads.grad_weights = grad_weight_rows.const_data_ptr();
  }
  const int64_t chunk_rows = std::max(kRowsPerChunk, divide_up(rows, kMaxChunks));
  const int64_t chunks = std::max<int64_t>(1, divide_up(rows, chunk_rows));
  const ChunkSums query_sums(needs_query && arguments.problem.one_query, chunks, {arguments.problem.columns},
                             saved_weights.options());
  query_sums.clear();
  if (needs_query && !arguments.problem.one_query) {
    result.push_back(at::empty(folded_query.sizes(), folded_query.options()));
    grads.grad_query = result.back().data_ptr();
  }
  c10::SmallVector<void*, kInlineAdapters> grad_outputs;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (needs_outputs[i]) result.push_back(at::empty(outputs[i].sizes(), outputs[i].options()));
    grad_outputs.push_back(needs_outputs[i] ? result.back().data_ptr() : nullptr);
  }
  grads.grad_outputs = grad_outputs.data();

  arguments.run(chunks, chunk_rows, [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      FusionGradients part = grads;
      if (arguments.problem.one_query) part.grad_query = query_sums.of_chunk(chunk);
      arguments.kernels.backward(arguments.problem, part, chunk * chunk_rows, std::min(rows, (chunk + 1) * chunk_rows),
                                 memory);
    }
  });
  if (query_sums.sums.defined()) {
    result.insert(result.begin(), as_type(query_sums.total(), folded_query.scalar_type()));
  }
  return result;
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("adapter_fusion", adapter_fusion);
  m.impl("adapter_fusion_backward", adapter_fusion_backward);
}

}  // namespace
}  // namespace peft_ext
