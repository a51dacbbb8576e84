// multi_lora_linear on the CPU: the base GEMM over all rows at once, then each adapter's branch over its rows.
//
//   forward   y_i = x_i W^T + b + s_a drop_a(x_i) A_a^T B_a^T,  a = index_i;  -1: no branch
//   backward  as cpu/lora_branch.h, the gradients of A_a and B_a summed over the rows of a
//
// Grouping  A counting sort of the index gives every adapter the numbers of its rows, ascending. The rows are never
//           moved: the kernels of lora_linear take row numbers, read runs of consecutive rows where they lie and gather
//           the others block by block.
// Factors   Used where they lie if they are contiguous, of the accumulation type, and serve few rows (decoding: one
//           row an adapter, where the bytes of A and B are all there is to it). Else the thread that works on a chunk
//           widens and transposes them in its scratch memory, which costs little beside a chunk of 64 rows or more.
// Threads   Chunks of one adapter's rows, taken by whichever thread is free. They depend on the sizes alone, every
//           chunk writes rows and sums of its own, and so a result does not depend on the threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/lora_checks.h"
#include "cpu/chunk_sums.h"
#include "cpu/dropout.h"
#include "cpu/frozen_weight.h"
#include "cpu/kernels.h"
#include "cpu/lora_problem.h"
#include "cpu/rows.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Flags = c10::List<bool>;

// The numbers of the rows of x, grouped by adapter: those of adapter a from offsets[a] up to offsets[a + 1], ascending.
struct RowGroups {
  std::vector<int64_t> offsets, numbers;
};

// Each element of the index stands for as many consecutive rows as there are more rows than elements.
RowGroups group_rows(const at::Tensor& index, int64_t rows, int64_t adapters) {
  const at::Tensor flat = index.contiguous();
  const int64_t* adapter_of = flat.const_data_ptr<int64_t>();
  const int64_t elements = flat.numel(), span = elements ? rows / elements : 0;
  RowGroups groups;
  groups.offsets.assign(adapters + 1, 0);
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t adapter = adapter_of[i];
    TORCH_CHECK_VALUE(adapter >= -1 && adapter < adapters, "index must be in [-1, ", adapters, ") for ", adapters,
                      " adapters, but holds ", adapter);
    if (adapter >= 0) groups.offsets[adapter + 1] += span;
  }
  for (int64_t a = 0; a < adapters; ++a) groups.offsets[a + 1] += groups.offsets[a];
  groups.numbers.resize(groups.offsets[adapters]);
  std::vector<int64_t> next(groups.offsets);
  for (int64_t i = 0; i < elements; ++i) {
    if (adapter_of[i] < 0) continue;
    for (int64_t j = 0; j < span; ++j) groups.numbers[next[adapter_of[i]]++] = i * span + j;
  }
  return groups;
}

// Contiguous, and of a type that the kernels widen to `acc`.
at::Tensor readable(const at::Tensor& factor, at::ScalarType acc) {
  return (acc_type(factor.scalar_type()) == acc ? factor : factor.to(acc)).contiguous();
}

// An adapter and the place and number of its rows among the grouped ones; without rows, nothing else is set.
struct Branch {
  int64_t begin = 0, rows = 0;
  at::Tensor lora_A, lora_B;
  LoraProblem problem{};
};

constexpr int64_t kFirstColumn = 0;

std::vector<Branch> make_branches(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_A,
                                  at::TensorList lora_B, const at::Tensor& scalings, const RowGroups& groups,
                                  at::ArrayRef<double> dropout_p, const OptionalTensor& seed) {
  const at::ScalarType acc = acc_type(x.scalar_type());
  const at::Tensor values = as_type(scalings, at::kDouble).contiguous();
  std::vector<Branch> branches(lora_A.size());
  for (size_t a = 0; a < branches.size(); ++a) {
    const double scaling = values.const_data_ptr<double>()[a];
    TORCH_CHECK_VALUE(std::isfinite(scaling), "scalings must be finite, but scalings[", a, "] is ", scaling);
    Branch& branch = branches[a];
    branch.begin = groups.offsets[a];
    branch.rows = groups.offsets[a + 1] - branch.begin;
    if (branch.rows == 0) continue;
    branch.lora_A = readable(lora_A[a], acc);
    branch.lora_B = readable(lora_B[a], acc);
    LoraProblem& problem = branch.problem;
    set_input(problem, x, branch.rows, weight.size(0));
    problem.row_numbers = groups.numbers.data();
    problem.rank = lora_B[a].size(1);
    problem.groups = 1;
    problem.width = weight.size(0);
    problem.columns = &kFirstColumn;
    problem.scaling = scaling;
    problem.dropout = make_dropout(dropout_p.empty() ? 0.0 : dropout_p[a], seed);
  }
  return branches;
}

// Rows [begin, end) of the grouped ones, all of one adapter, and where the sums over them go.
struct Chunk {
  const Branch* branch;
  int64_t begin, end;
  void* grad_A = nullptr;
  void* grad_B = nullptr;
};

// Chunk number `i` of `count`.
Chunk cut(const Branch& branch, int64_t i, int64_t count) {
  return {&branch, branch.begin + i * branch.rows / count, branch.begin + (i + 1) * branch.rows / count};
}

// A thread's memory, handed out piece by piece, in elements of the accumulation type.
class Scratch {
 public:
  Scratch(char* memory, const at::Tensor& workspace) : next_(memory), element_(workspace.element_size()) {}

  void* take(int64_t elements) {
    void* piece = next_;
    next_ += elements * element_;
    return piece;
  }

  // The factor where it lies, or widened.
  const void* widened(const at::Tensor& factor, at::ScalarType acc) {
    if (factor.scalar_type() == acc) return factor.const_data_ptr();
    void* target = take(factor.numel());
    lora_kernels(factor.scalar_type()).widen({factor.const_data_ptr(), factor.numel(), target});
    return target;
  }

  // source [rows, columns], as [columns, rows].
  const void* transposed(const LoraKernels& kernels, const void* source, int64_t rows, int64_t columns) {
    void* target = take(rows * columns);
    kernels.transpose({source, rows, columns, target, rows});
    return target;
  }

 private:
  char* next_;
  const int64_t element_;
};

// What a chunk of the branch takes of a Scratch: the copies of its factors, the kernel's workspace, and the gradient of
// B before it is transposed.
int64_t scratch_elements(const Branch& branch, bool backward, bool needs_B) {
  const LoraProblem& problem = branch.problem;
  const bool widening = acc_type(branch.lora_A.scalar_type()) != branch.lora_A.scalar_type();
  const int64_t copies = (widening ? 1 : 0) + (problem.few_rows ? 0 : 1);
  const int64_t grad_B = needs_B && !problem.few_rows ? problem.rank * problem.out_features : 0;
  return copies * problem.rank * (problem.in_features + problem.out_features) +
         LoraWorkspace(problem, backward).elements() + grad_B;
}

// Calls work(chunk, scratch) for all chunks, on all threads.
template <class Work>
void run_chunks(const std::vector<Chunk>& chunks, int64_t elements, const at::Tensor& x, const Work& work) {
  const int64_t tasks = static_cast<int64_t>(chunks.size());
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  const at::Tensor workspace = at::empty({threads, elements}, x.options().dtype(acc_type(x.scalar_type())));
  run_unequal_tasks(tasks, workspace, [&](int64_t i, char* memory) { work(chunks[i], Scratch(memory, workspace)); });
}

void add_branches(const at::Tensor& y, const at::Tensor& x, const std::vector<Branch>& branches) {
  constexpr int64_t kChunkRows = 64;
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (const Branch& branch : branches) {
    if (branch.rows == 0) continue;
    const int64_t count = std::max<int64_t>(branch.rows / kChunkRows, 1);
    for (int64_t i = 0; i < count; ++i) chunks.push_back(cut(branch, i, count));
    elements = std::max(elements, scratch_elements(branch, false, false));
  }
  const at::ScalarType acc = acc_type(x.scalar_type());
  const auto& kernels = lora_kernels(x.scalar_type());
  run_chunks(chunks, elements, x, [&](const Chunk& chunk, Scratch scratch) {
    LoraForward problem{chunk.branch->problem};
    problem.y = y.data_ptr();
    problem.y_stride = problem.source_stride = y.stride(0);
    problem.source = y.const_data_ptr();
    problem.lora_A = scratch.widened(chunk.branch->lora_A, acc);
    problem.lora_B = scratch.widened(chunk.branch->lora_B, acc);
    if (!problem.few_rows) {
      problem.lora_A_t = scratch.transposed(kernels, problem.lora_A, problem.rank, problem.in_features);
      problem.lora_B_t = scratch.transposed(kernels, problem.lora_B, problem.out_features, problem.rank);
    }
    kernels.forward(problem, chunk.begin, chunk.end, scratch.take(0));
  });
}

// The gradients of an adapter's factors in the accumulation type, chunk by chunk.
struct FactorSums {
  ChunkSums lora_A, lora_B;
};

// `grad_x` holds grad_y W already and gets the branches' part; undefined where it is not asked for.
std::vector<FactorSums> branches_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& grad_x,
                                          const std::vector<Branch>& branches, const Flags& needs_A,
                                          const Flags& needs_B) {
  const at::ScalarType acc = acc_type(x.scalar_type());
  const auto options = x.options().dtype(acc);
  std::vector<FactorSums> sums;
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  sums.reserve(branches.size());
  for (size_t a = 0; a < branches.size(); ++a) {
    const Branch& branch = branches[a];
    const LoraProblem& problem = branch.problem;
    const bool used = branch.rows > 0, sums_A = used && needs_A[a], sums_B = used && needs_B[a];
    const int64_t count = used ? count_factor_chunks(branch.rows, problem.rank) : 0;
    sums.push_back({ChunkSums(sums_A, count, {problem.rank, problem.in_features}, options),
                    ChunkSums(sums_B, count, {problem.out_features, problem.rank}, options)});
    if (!used || !(sums_A || sums_B || grad_x.defined())) continue;
    elements = std::max(elements, scratch_elements(branch, true, sums_B));
    for (int64_t i = 0; i < count; ++i) {
      chunks.push_back(cut(branch, i, count));
      chunks.back().grad_A = sums[a].lora_A.of_chunk(i);
      chunks.back().grad_B = sums[a].lora_B.of_chunk(i);
    }
  }
  const auto& kernels = lora_kernels(x.scalar_type());
  run_chunks(chunks, elements, x, [&](const Chunk& chunk, Scratch scratch) {
    LoraBackward problem{chunk.branch->problem};
    problem.grad_y = grad_y.const_data_ptr();
    problem.grad_y_stride = grad_y.stride(0);
    problem.grad_x = grad_x.defined() ? grad_x.data_ptr() : nullptr;
    problem.grad_x_stride = problem.in_features;
    problem.needs_A = chunk.grad_A != nullptr;
    problem.needs_B = chunk.grad_B != nullptr;
    problem.lora_A = scratch.widened(chunk.branch->lora_A, acc);
    problem.lora_B = scratch.widened(chunk.branch->lora_B, acc);
    const bool transposing = problem.needs_B && !problem.few_rows;
    void* grad_B = chunk.grad_B;
    if (transposing) {
      problem.lora_A_t = scratch.transposed(kernels, problem.lora_A, problem.rank, problem.in_features);
      grad_B = scratch.take(problem.rank * problem.out_features);
    }
    kernels.backward(problem, chunk.begin, chunk.end, chunk.grad_A, grad_B, scratch.take(0));
    if (transposing) kernels.transpose({grad_B, problem.rank, problem.out_features, chunk.grad_B, problem.rank});
  });
  return sums;
}

// The gradient of a factor from the sums over its adapter's rows, if it has any.
at::Tensor finished(const ChunkSums& sums, const at::Tensor& factor) {
  if (!sums.sums.defined()) return at::zeros(factor.sizes(), factor.options());
  return as_type(sums.total(), factor.scalar_type());
}

at::Tensor multi_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                             at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                             const at::Tensor& index, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                             const OptionalTensor& weight_scale) {
  check_multi_lora(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  const at::Tensor rows = as_rows(x);
  const RowGroups groups = group_rows(index, rows.size(0), static_cast<int64_t>(lora_A.size()));
  const auto branches = make_branches(rows, weight, lora_A, lora_B, scalings, groups, dropout_p, seed);
  const at::Tensor y = FrozenWeight(weight, weight_scale).product(rows, bias);
  add_branches(y, rows, branches);
  return with_leading_sizes(y, x);
}

std::vector<at::Tensor> multi_lora_linear_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                   const at::Tensor& weight, at::TensorList lora_A,
                                                   at::TensorList lora_B, const at::Tensor& scalings,
                                                   const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                                   const OptionalTensor& seed, bool needs_x, bool needs_bias,
                                                   const Flags& needs_A, const Flags& needs_B,
                                                   const OptionalTensor& weight_scale) {
  check_multi_lora(x, weight, std::nullopt, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale);
  check_multi_lora_saved(grad_y, x, weight, lora_A, needs_A, needs_B);
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const RowGroups groups = group_rows(index, rows.size(0), static_cast<int64_t>(lora_A.size()));
  const auto branches = make_branches(rows, weight, lora_A, lora_B, scalings, groups, dropout_p, seed);

  std::vector<at::Tensor> grads;
  const at::Tensor grad_x = needs_x ? FrozenWeight(weight, weight_scale).product_backward(grad_rows) : at::Tensor();
  if (needs_x) grads.push_back(with_leading_sizes(grad_x, x));
  if (needs_bias) grads.push_back(grad_rows.sum(0));
  const auto sums = branches_backward(grad_rows, rows, grad_x, branches, needs_A, needs_B);
  for (size_t a = 0; a < sums.size(); ++a) {
    if (needs_A[a]) grads.push_back(finished(sums[a].lora_A, lora_A[a]));
  }
  for (size_t a = 0; a < sums.size(); ++a) {
    if (needs_B[a]) grads.push_back(finished(sums[a].lora_B, lora_B[a]));
  }
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace
}  // namespace peft_ext
