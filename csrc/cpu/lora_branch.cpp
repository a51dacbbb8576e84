#include "cpu/lora_branch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <c10/util/SmallVector.h>

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

// target = scale source, any strides of source; zeros in target's columns beyond source's.
template <class C>
void pack_as(const at::Tensor& target, const at::Tensor& source, C scale) {
  const C* from = source.const_data_ptr<C>();
  C* to = target.data_ptr<C>();
  const int64_t rows = source.size(0), columns = source.size(1), padded = target.size(1);
  const int64_t row_stride = source.stride(0), column_stride = source.stride(1);
  for (int64_t i = 0; i < rows; ++i) {
    C* row = to + i * target.stride(0);
    for (int64_t j = 0; j < columns; ++j) row[j] = scale * from[i * row_stride + j * column_stride];
    for (int64_t j = columns; j < padded; ++j) row[j] = 0;
  }
}

void pack(const at::Tensor& target, const at::Tensor& source, double scale) {
  if (source.scalar_type() == at::kDouble) return pack_as<double>(target, source, scale);
  pack_as<float>(target, source, static_cast<float>(scale));
}

// The adapters in the forms that kernels/lora_linear.h describes; each is packed when it is first asked for.
class Adapters {
 public:
  Adapters(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
           double scaling)
      : rank(lora_B.size(1)),
        padded((rank + kRankPadding - 1) / kRankPadding * kRankPadding),
        groups(lora_A.size(0) / rank),
        width(lora_B.size(0) / groups),
        scaling_(scaling),
        a_(lora_A.to(acc_type(weight.scalar_type())).contiguous()),
        b_(lora_B.to(acc_type(weight.scalar_type())).contiguous()) {
    for (size_t i = 0; i < enable_lora.size(); ++i) {
      if (enable_lora[i]) columns.push_back(static_cast<int64_t>(i) * width);
    }
  }

  at::TensorOptions options() const { return a_.options(); }

  const at::Tensor& lora_A() const { return a_; }  // [groups * rank, in_features]

  const at::Tensor& lora_A_t() {  // s A^T [in_features, groups * padded]
    if (a_t_.defined()) return a_t_;
    a_t_ = at::empty({a_.size(1), groups * padded}, options());
    for (int64_t g = 0; g < groups; ++g) {
      pack(a_t_.narrow(1, g * padded, padded), a_.narrow(0, g * rank, rank).t(), scaling_);
    }
    return a_t_;
  }

  const at::Tensor& lora_B() {  // s B [groups * width, padded]
    if (b_packed_.defined()) return b_packed_;
    b_packed_ = at::empty({groups * width, padded}, options());
    pack(b_packed_, b_, scaling_);
    return b_packed_;
  }

  const at::Tensor& lora_B_t() {  // [groups * rank, width]
    if (b_t_.defined()) return b_t_;
    b_t_ = at::empty({groups * rank, width}, options());
    for (int64_t g = 0; g < groups; ++g) {
      pack(b_t_.narrow(0, g * rank, rank), b_.narrow(0, g * width, width).t(), 1.0);
    }
    return b_t_;
  }

  const int64_t rank, padded, groups, width;
  c10::SmallVector<int64_t, 4> columns;  // Where each group's output begins.

 private:
  double scaling_;
  at::Tensor a_, b_, a_t_, b_packed_, b_t_;
};

void fill_problem(LoraProblem& problem, const Adapters& adapters, const at::Tensor& x, int64_t out_features,
                  const Dropout& dropout) {
  problem.in_features = x.size(1);
  problem.out_features = out_features;
  problem.rank = adapters.rank;
  problem.padded = adapters.padded;
  problem.groups = adapters.groups;
  problem.width = adapters.width;
  problem.columns = adapters.columns.data();
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
at::Tensor merged_weight(const at::Tensor& weight, Adapters& adapters) {
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  const at::Tensor source = transposed ? weight.t() : weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor target = at::empty(source.sizes(), source.options());
  if (adapters.groups * adapters.width != weight.size(0)) target.copy_(source);
  const auto& kernels = lora_kernels(weight.scalar_type());
  for (int64_t g = 0; g < adapters.groups; ++g) {
    const int64_t dim = transposed ? 1 : 0;
    const at::Tensor from = source.narrow(dim, adapters.columns[g], adapters.width);
    const at::Tensor to = target.narrow(dim, adapters.columns[g], adapters.width);
    const at::Tensor left = transposed ? adapters.lora_A_t().narrow(1, g * adapters.padded, adapters.padded)
                                       : adapters.lora_B().narrow(0, g * adapters.width, adapters.width);
    const at::Tensor right =
        (transposed ? adapters.lora_B_t() : adapters.lora_A()).narrow(0, g * adapters.rank, adapters.rank);
    const LowRankSum sum{from.const_data_ptr(),  from.stride(0),        to.data_ptr(),  to.stride(0),
                         from.size(1),           left.const_data_ptr(), left.stride(0), 1,
                         right.const_data_ptr(), adapters.rank};
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
  Adapters adapters(weight, lora_A, lora_B, enable_lora, scaling);
  if (can_merge(weight, dropout) && m * (k + lora_B.size(0)) >= n * k) {
    return at::linear(rows, merged_weight(weight, adapters), bias).view(shape);
  }

  const at::Tensor y = at::linear(rows, weight, bias);
  LoraForward problem{};
  fill_problem(problem, adapters, rows, n, dropout);
  problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
  problem.lora_B_t = adapters.lora_B_t().const_data_ptr();
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
  Adapters adapters(weight, lora_A, lora_B, enable_lora, scaling);
  const bool merge = can_merge(weight, dropout) && m >= n;

  LoraBackward problem{};
  fill_problem(problem, adapters, rows, n, dropout);
  problem.grad_y = grad_rows.const_data_ptr();
  problem.grad_y_stride = grad_rows.stride(0);
  problem.grad_x_stride = k;
  problem.needs_A = needs_A;
  problem.needs_B = needs_B;
  std::vector<at::Tensor> grads;
  if (needs_x) {
    const at::Tensor grad_x = at::mm(grad_rows, merge ? merged_weight(weight, adapters) : weight);
    if (!merge) problem.grad_x = grad_x.data_ptr();
    grads.push_back(grad_x.view(x.sizes()));
  }
  if (needs_bias) grads.push_back(grad_rows.sum(0));

  const int64_t chunks = count_chunks(m, adapters.rank);
  const at::Tensor grad_A = at::zeros({needs_A ? chunks : 0, lora_A.size(0), k}, adapters.options());
  const at::Tensor grad_B_t =
      at::zeros({needs_B ? chunks : 0, adapters.groups, adapters.rank, adapters.width}, adapters.options());
  if (needs_A || problem.grad_x) problem.lora_B = adapters.lora_B().const_data_ptr();
  if (needs_B) problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
  problem.lora_A = adapters.lora_A().const_data_ptr();
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
