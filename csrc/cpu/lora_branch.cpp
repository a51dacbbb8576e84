#include "cpu/lora_branch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
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
  if (tensor.dim() == 2 && tensor.stride(1) == 1) return tensor;
  const int64_t features = tensor.size(-1);
  int64_t rows = 1;
  for (const int64_t size : tensor.sizes().slice(0, tensor.dim() - 1)) rows *= size;
  const at::Tensor matrix = tensor.reshape({rows, features});
  return features <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

// [rows, features] with the leading sizes of `like`.
at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  if (like.dim() == 2) return rows;
  auto shape = like.sizes().vec();
  shape.back() = rows.size(1);
  return rows.view(shape);
}

at::Tensor as_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
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

// The adapters in the forms that kernels/lora_linear.h describes; each is packed when it is first asked for.
class Adapters {
 public:
  Adapters(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
           double scaling)
      : rank(lora_B.size(1)),
        padded((rank + kRankPadding - 1) / kRankPadding * kRankPadding),
        groups(lora_A.size(0) / rank),
        width(lora_B.size(0) / groups),
        scaling(scaling),
        a_(as_type(lora_A, acc_type(weight.scalar_type())).contiguous()),
        b_(as_type(lora_B, acc_type(weight.scalar_type())).contiguous()) {
    for (size_t i = 0; i < enable_lora.size(); ++i) {
      if (enable_lora[i]) columns.push_back(static_cast<int64_t>(i) * width);
    }
  }

  at::TensorOptions options() const { return a_.options(); }

  const at::Tensor& lora_A() const { return a_; }  // [groups * rank, in_features]

  const at::Tensor& lora_A_t() {  // s A^T [in_features, groups * padded]
    if (a_t_.defined()) return a_t_;
    a_t_ = at::empty({a_.size(1), groups * padded}, options());
    for (int64_t g = 0; g < groups; ++g) transpose(a_, g, rank, a_t_, g * padded, padded, scaling);
    return a_t_;
  }

  const at::Tensor& lora_B() {  // s B [groups * width, padded]
    if (b_packed_.defined()) return b_packed_;
    b_packed_ = b_.mul(scaling);
    if (padded != rank) b_packed_ = at::constant_pad_nd(b_packed_, {0, padded - rank});
    return b_packed_;
  }

  const at::Tensor& lora_B_t() {  // [groups * rank, width]
    if (b_t_.defined()) return b_t_;
    b_t_ = at::empty({groups * rank, width}, options());
    for (int64_t g = 0; g < groups; ++g) transpose(b_, g, width, b_t_, g * rank * width, width, 1.0);
    return b_t_;
  }

  const int64_t rank, padded, groups, width;
  const double scaling;
  c10::SmallVector<int64_t, 4> columns;  // Where each group's output begins.

  at::Tensor group_A(int64_t g) const { return part(a_, 0, g * rank, rank); }
  at::Tensor group_B(int64_t g) const { return part(b_, 0, g * width, width); }
  at::Tensor group_columns(const at::Tensor& y, int64_t g) const { return part(y, 1, columns[g], width); }

 private:
  static at::Tensor part(const at::Tensor& whole, int64_t dim, int64_t begin, int64_t size) {
    return whole.size(dim) == size ? whole : whole.narrow(dim, begin, size);
  }

  // Group g of source, `rows` rows, transposed into target from element `offset` on.
  void transpose(const at::Tensor& source, int64_t g, int64_t rows, const at::Tensor& target, int64_t offset,
                 int64_t target_columns, double scale) const {
    const int64_t columns = source.size(1), element = source.element_size();
    const auto* from = static_cast<const char*>(source.const_data_ptr()) + g * rows * columns * element;
    auto* to = static_cast<char*>(target.data_ptr()) + offset * element;
    lora_kernels(source.scalar_type()).transpose({from, rows, columns, to, target.stride(0), target_columns, scale});
  }

  at::Tensor a_, b_, a_t_, b_packed_, b_t_;
};

void fill_problem(LoraProblem& problem, const Adapters& adapters, const at::Tensor& x, int64_t out_features,
                  const Dropout& dropout) {
  problem.block = std::min(lora_block_rows(x.size(1), out_features), x.size(0));
  problem.widen = acc_type(x.scalar_type()) != x.scalar_type();
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
  return at::empty({threads, LoraWorkspace(problem).elements()}, like.options().dtype(acc_type(like.scalar_type())));
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

enum class Order { kDirect, kBranch, kMerge };

// What reading and writing an element costs beside its r multiply-adds, in multiply-adds: measured on one core
// with AVX-512. W' is a new tensor and comes from farther away than the block of y that has just been multiplied.
constexpr int64_t kMergeTraffic = 14, kBranchTraffic = 6;
// Below this, packing the factors for the kernels costs more than at::'s matrix-vector products.
constexpr int64_t kFewRows = 16;

// `row_elements`: how many elements of each row the branch touches that merging spares.
Order choose_order(const at::Tensor& weight, const Adapters& adapters, const Dropout& dropout, int64_t m,
                   int64_t row_elements) {
  if (dropout.threshold != 0 || acc_type(weight.scalar_type()) != weight.scalar_type()) return Order::kBranch;
  if (m < kFewRows) return Order::kDirect;
  const int64_t merge = weight.numel() * (adapters.rank + kMergeTraffic);
  const int64_t branch = m * row_elements * (adapters.rank + kBranchTraffic);
  return merge < branch ? Order::kMerge : Order::kBranch;
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

void forward_directly(const at::Tensor& y, const at::Tensor& rows, const Adapters& adapters) {
  for (int64_t g = 0; g < adapters.groups; ++g) {
    const at::Tensor hidden = at::mm(rows, adapters.group_A(g).t());
    adapters.group_columns(y, g).addmm_(hidden, adapters.group_B(g).t(), 1, adapters.scaling);
  }
}

void forward_by_kernel(const at::Tensor& y, const at::Tensor& rows, Adapters& adapters, const Dropout& dropout) {
  const int64_t m = rows.size(0);
  if (m == 0) return;
  LoraForward problem{};
  fill_problem(problem, adapters, rows, y.size(1), dropout);
  problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
  problem.lora_B_t = adapters.lora_B_t().const_data_ptr();
  problem.y = y.data_ptr();
  problem.y_stride = y.stride(0);
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  const auto& kernels = lora_kernels(rows.scalar_type());
  run_tasks(blocks, make_workspace(problem, blocks, rows), [&](int64_t begin, int64_t end, void* memory) {
    kernels.forward(problem, begin * block, std::min(m, end * block), memory);
  });
}

// The gradients of the factors in the accumulation type; a gradient that was not asked for is undefined.
struct FactorGrads {
  at::Tensor lora_A, lora_B;
};

// `grad_x` holds grad_y W already and gets the branch's part; undefined where there is nothing to add to.
FactorGrads backward_directly(const at::Tensor& grad_rows, const at::Tensor& rows, const at::Tensor& grad_x,
                              const Adapters& adapters, bool needs_A, bool needs_B) {
  std::vector<at::Tensor> grads_A, grads_B;
  for (int64_t g = 0; g < adapters.groups; ++g) {
    const at::Tensor grad = adapters.group_columns(grad_rows, g);
    if (needs_A || grad_x.defined()) {
      const at::Tensor grad_hidden = at::mm(grad, adapters.group_B(g)).mul_(adapters.scaling);
      if (needs_A) grads_A.push_back(at::mm(grad_hidden.t(), rows));
      if (grad_x.defined()) grad_x.addmm_(grad_hidden, adapters.group_A(g));
    }
    if (needs_B) {
      const at::Tensor hidden = at::mm(rows, adapters.group_A(g).t()).mul_(adapters.scaling);
      grads_B.push_back(at::mm(grad.t(), hidden));
    }
  }
  const auto join = [](const std::vector<at::Tensor>& parts) {
    return parts.empty() ? at::Tensor() : parts.size() == 1 ? parts[0] : at::cat(parts);
  };
  return {join(grads_A), join(grads_B)};
}

FactorGrads backward_by_kernel(const at::Tensor& grad_rows, const at::Tensor& rows, const at::Tensor& grad_x,
                               Adapters& adapters, const Dropout& dropout, bool needs_A, bool needs_B) {
  const int64_t m = rows.size(0), k = rows.size(1), chunks = count_chunks(m, adapters.rank);
  const at::Tensor grad_A = at::zeros({needs_A ? chunks : 0, adapters.groups * adapters.rank, k}, adapters.options());
  const at::Tensor grad_B_t =
      at::zeros({needs_B ? chunks : 0, adapters.groups, adapters.rank, adapters.width}, adapters.options());
  if (m > 0) {
    LoraBackward problem{};
    fill_problem(problem, adapters, rows, grad_rows.size(1), dropout);
    problem.lora_A = adapters.lora_A().const_data_ptr();
    if (needs_A || grad_x.defined()) problem.lora_B = adapters.lora_B().const_data_ptr();
    if (needs_B) problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
    problem.grad_y = grad_rows.const_data_ptr();
    problem.grad_y_stride = grad_rows.stride(0);
    problem.grad_x = grad_x.defined() ? grad_x.data_ptr() : nullptr;
    problem.grad_x_stride = k;
    problem.needs_A = needs_A;
    problem.needs_B = needs_B;
    const auto& kernels = lora_kernels(rows.scalar_type());
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
  FactorGrads grads;
  if (needs_A) grads.lora_A = sum_chunks(grad_A);
  if (needs_B) grads.lora_B = sum_chunks(grad_B_t).transpose(1, 2).reshape({-1, adapters.rank}).contiguous();
  return grads;
}

}  // namespace

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
                        double scaling, double dropout_p, const std::optional<at::Tensor>& seed) {
  check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed);
  const at::Tensor rows = as_rows(x);
  const Dropout dropout = make_dropout(dropout_p, seed);
  Adapters adapters(weight, lora_A, lora_B, enable_lora, scaling);
  const Order order = choose_order(weight, adapters, dropout, rows.size(0), weight.size(1) + lora_B.size(0));
  const at::Tensor y = at::linear(rows, order == Order::kMerge ? merged_weight(weight, adapters) : weight, bias);
  if (order == Order::kDirect) {
    forward_directly(y, rows, adapters);
  } else if (order == Order::kBranch) {
    forward_by_kernel(y, rows, adapters, dropout);
  }
  return with_leading_sizes(y, x);
}

std::vector<at::Tensor> lora_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      at::ArrayRef<bool> enable_lora, double scaling, double dropout_p,
                                      const std::optional<at::Tensor>& seed, std::array<bool, 4> needs) {
  check_lora(x, weight, std::nullopt, lora_A, lora_B, enable_lora, scaling, dropout_p, seed);
  check_lora_grad(grad_y, x, weight);
  const auto [needs_x, needs_bias, needs_A, needs_B] = needs;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const Dropout dropout = make_dropout(dropout_p, seed);
  Adapters adapters(weight, lora_A, lora_B, enable_lora, scaling);
  // Only grad_x can come from W': the branch would touch its elements for that alone.
  const Order order = choose_order(weight, adapters, dropout, rows.size(0), rows.size(1));

  std::vector<at::Tensor> grads;
  at::Tensor unfinished_grad_x;
  if (needs_x) {
    const bool merge = order == Order::kMerge;
    const at::Tensor grad_x = at::mm(grad_rows, merge ? merged_weight(weight, adapters) : weight);
    if (!merge) unfinished_grad_x = grad_x;
    grads.push_back(with_leading_sizes(grad_x, x));
  }
  if (needs_bias) grads.push_back(grad_rows.sum(0));
  if (!needs_A && !needs_B && !unfinished_grad_x.defined()) return grads;

  const FactorGrads factors =
      order == Order::kDirect
          ? backward_directly(grad_rows, rows, unfinished_grad_x, adapters, needs_A, needs_B)
          : backward_by_kernel(grad_rows, rows, unfinished_grad_x, adapters, dropout, needs_A, needs_B);
  if (needs_A) grads.push_back(as_type(factors.lora_A, lora_A.scalar_type()));
  if (needs_B) grads.push_back(as_type(factors.lora_B, lora_B.scalar_type()));
  return grads;
}

}  // namespace peft_ext
