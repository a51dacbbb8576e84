#include "cpu/lora_branch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "common/lora_checks.h"
#include "cpu/kernels.h"

namespace peft_ext {
namespace {

// [..., features] as [rows, features] whose rows are contiguous, without a copy where the strides allow.
at::Tensor as_rows(const at::Tensor& tensor) {
  const int64_t features = tensor.size(-1);
  int64_t rows = 1;
  for (const int64_t size : tensor.sizes().slice(0, tensor.dim() - 1)) rows *= size;
  const at::Tensor matrix = tensor.reshape({rows, features});
  return features <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

Dropout make_dropout(double p, const std::optional<at::Tensor>& seed) {
  Dropout dropout;
  dropout.threshold = static_cast<uint32_t>(std::lrint(p * 65536.0));
  if (dropout.threshold == 0) return dropout;
  const uint32_t kept = 65536 - dropout.threshold;
  dropout.scale = kept ? 65536.0 / kept : 0.0;
  dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return dropout;
}

// The adapters in the kernels' form: accumulation type, contiguous, B transposed slice by slice.
struct Adapters {
  Adapters(const at::Tensor& weight, const at::Tensor& a, const at::Tensor& b, at::ArrayRef<bool> enable_lora)
      : rank(b.size(1)), groups(a.size(0) / rank), width(b.size(0) / groups) {
    const auto type = acc_type(weight.scalar_type());
    lora_A = a.to(type).contiguous();
    lora_B_t = b.reshape({groups, width, rank}).transpose(1, 2).to(type).contiguous();
    const auto* data = static_cast<const char*>(lora_B_t.const_data_ptr());
    for (size_t i = 0; i < enable_lora.size(); ++i) {
      if (!enable_lora[i]) continue;
      const auto group = static_cast<int64_t>(slices.size());
      slices.push_back({static_cast<int64_t>(i) * width, width, group * rank, rank,
                        data + group * rank * width * lora_B_t.element_size()});
    }
  }

  int64_t rank, groups, width;
  at::Tensor lora_A;    // [groups * rank, in_features]
  at::Tensor lora_B_t;  // [groups, rank, width]
  std::vector<LoraSlice> slices;
};

void fill_problem(LoraProblem& problem, const Adapters& adapters, const at::Tensor& x, int64_t out_features,
                  double scaling, const Dropout& dropout) {
  problem.in_features = x.size(1);
  problem.out_features = out_features;
  problem.ranks = adapters.lora_A.size(0);
  problem.lora_A = adapters.lora_A.const_data_ptr();
  problem.slices = adapters.slices.data();
  problem.num_slices = static_cast<int64_t>(adapters.slices.size());
  problem.scaling = scaling;
  problem.dropout = dropout;
  problem.x = x.const_data_ptr();
  problem.x_stride = x.stride(0);
}

// One row of scratch memory for each thread that `tasks` can occupy.
at::Tensor make_workspace(const LoraProblem& problem, int64_t tasks, const at::Tensor& like) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  return at::empty({threads, lora_workspace(problem)}, like.options().dtype(acc_type(like.scalar_type())));
}

template <class Task>
void run_tasks(int64_t tasks, const at::Tensor& workspace, const Task& task) {
  auto* memory = static_cast<char*>(workspace.data_ptr());
  const int64_t stride = workspace.stride(0) * workspace.element_size();
  const int64_t threads = workspace.size(0);
  const int64_t share = (tasks + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      task(thread * share, std::min(tasks, (thread + 1) * share), memory + thread * stride);
    }
  });
}

bool can_merge(const at::Tensor& weight, const Dropout& dropout) {
  return dropout.threshold == 0 && acc_type(weight.scalar_type()) == weight.scalar_type();
}

// W + s B A as a new tensor, in W's layout: the rows of the physical matrix are summed, so that a transposed
// weight (Conv1D) costs the same.
at::Tensor merged_weight(const at::Tensor& weight, const Adapters& adapters, double scaling) {
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  const at::Tensor source = transposed ? weight.t() : weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor target = at::empty(source.sizes(), source.options());
  const at::Tensor scaled = adapters.lora_B_t.mul(scaling);  // [groups, rank, width]
  if (adapters.groups * adapters.width != weight.size(0)) target.copy_(source);
  const auto& kernels = lora_kernels(weight.scalar_type());
  for (int64_t group = 0; group < adapters.groups; ++group) {
    const LoraSlice& slice = adapters.slices[group];
    const at::Tensor a = adapters.lora_A.narrow(0, slice.first_rank, slice.rank), b_t = scaled.select(0, group);
    const int64_t dim = transposed ? 1 : 0;
    const at::Tensor from = source.narrow(dim, slice.column, slice.columns);
    const at::Tensor to = target.narrow(dim, slice.column, slice.columns);
    const at::Tensor& left = transposed ? a : b_t;  // [rank, rows], read transposed
    const at::Tensor& right = transposed ? b_t : a;
    const LowRankSum sum{from.const_data_ptr(),
                         from.stride(0),
                         to.data_ptr(),
                         to.stride(0),
                         from.size(1),
                         left.const_data_ptr(),
                         1,
                         left.stride(0),
                         right.const_data_ptr(),
                         slice.rank};
    constexpr int64_t kGrain = 16;
    at::parallel_for(0, from.size(0), kGrain,
                     [&](int64_t begin, int64_t end) { kernels.low_rank_sum(sum, begin, end); });
  }
  return transposed ? target.t() : target;
}

// Row chunks over which the gradients of A and B are summed: enough to share among threads, few enough that
// their partial sums stay small beside x.
int64_t count_chunks(int64_t rows, int64_t rank) {
  constexpr int64_t kMinRows = 64, kMaxChunks = 64;
  return std::clamp<int64_t>(std::min(rows / kMinRows, rows / (4 * rank)), 1, kMaxChunks);
}

at::Tensor sum_chunks(const at::Tensor& partial) {
  return partial.size(0) == 1 ? partial.select(0, 0) : partial.sum(0);
}

}  // namespace

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
                        double scaling, double dropout_p, const std::optional<at::Tensor>& seed) {
  check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed);
  const at::Tensor rows = as_rows(x);
  const int64_t m = rows.size(0), k = weight.size(1), n = weight.size(0);
  auto shape = x.sizes().vec();
  shape.back() = n;
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Adapters adapters(weight, lora_A, lora_B, enable_lora);
  if (can_merge(weight, dropout) && m * (k + lora_B.size(0)) >= n * k) {
    return at::linear(rows, merged_weight(weight, adapters, scaling), bias).view(shape);
  }

  const at::Tensor y = at::linear(rows, weight, bias);
  LoraForward problem;
  fill_problem(problem, adapters, rows, n, scaling, dropout);
  problem.y = y.data_ptr();
  problem.y_stride = y.stride(0);
  const int64_t block = lora_block_rows(k, n);
  const int64_t blocks = (m + block - 1) / block;
  if (blocks == 0) return y.view(shape);
  const auto& kernels = lora_kernels(weight.scalar_type());
  run_tasks(blocks, make_workspace(problem, blocks, rows), [&](int64_t begin, int64_t end, void* memory) {
    kernels.forward(problem, begin * block, std::min(m, end * block), memory);
  });
  return y.view(shape);
}

std::vector<at::Tensor> lora_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      at::ArrayRef<bool> enable_lora, double scaling, double dropout_p,
                                      const std::optional<at::Tensor>& seed, std::array<bool, 4> needs) {
  check_lora(x, weight, std::nullopt, lora_A, lora_B, enable_lora, scaling, dropout_p, seed);
  check_lora_grad(grad_y, x, weight);
  const auto [needs_x, needs_bias, needs_A, needs_B] = needs;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const int64_t m = rows.size(0), k = weight.size(1), n = weight.size(0);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const Adapters adapters(weight, lora_A, lora_B, enable_lora);
  const bool merge = can_merge(weight, dropout) && m >= n;

  LoraBackward problem;
  fill_problem(problem, adapters, rows, n, scaling, dropout);
  problem.grad_y = grad_rows.const_data_ptr();
  problem.grad_y_stride = grad_rows.stride(0);
  problem.grad_x = nullptr;
  problem.grad_x_stride = k;
  problem.needs_A = needs_A;
  problem.needs_B = needs_B;
  std::vector<at::Tensor> grads;
  if (needs_x) {
    const at::Tensor grad_x = at::mm(grad_rows, merge ? merged_weight(weight, adapters, scaling) : weight);
    if (!merge) problem.grad_x = grad_x.data_ptr();
    grads.push_back(grad_x.view(x.sizes()));
  }
  if (needs_bias) grads.push_back(grad_rows.sum(0));

  const int64_t chunks = count_chunks(m, adapters.rank);
  const auto options = adapters.lora_A.options();
  const at::Tensor grad_A = at::zeros({needs_A ? chunks : 0, problem.ranks, k}, options);
  const at::Tensor grad_B_t =
      at::zeros({needs_B ? chunks : 0, adapters.groups, adapters.rank, adapters.width}, options);
  if (m > 0 && (needs_A || needs_B || problem.grad_x)) {
    const auto& kernels = lora_kernels(weight.scalar_type());
    const int64_t chunk_rows = (m + chunks - 1) / chunks;
    const auto chunk_of = [](const at::Tensor& partial, int64_t chunk) {
      return static_cast<char*>(partial.data_ptr()) + chunk * partial.stride(0) * partial.element_size();
    };
    run_tasks(chunks, make_workspace(problem, chunks, rows), [&](int64_t begin, int64_t end, void* memory) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        kernels.backward(problem, chunk * chunk_rows, std::min(m, (chunk + 1) * chunk_rows), chunk_of(grad_A, chunk),
                         chunk_of(grad_B_t, chunk), memory);
      }
    });
  }
  if (needs_A) grads.push_back(sum_chunks(grad_A).to(lora_A.scalar_type()));
  if (needs_B) {
    const at::Tensor sum = sum_chunks(grad_B_t).transpose(1, 2).reshape(lora_B.sizes());
    grads.push_back(sum.contiguous().to(lora_B.scalar_type()));
  }
  return grads;
}

}  // namespace peft_ext
