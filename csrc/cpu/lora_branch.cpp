#include "cpu/lora_branch.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <c10/util/SmallVector.h>

#include <algorithm>

#include "common/lora_checks.h"
#include "cpu/chunk_sums.h"
#include "cpu/dropout.h"
#include "cpu/frozen_weight.h"
#include "cpu/kernels.h"
#include "cpu/lora_problem.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace peft_ext {
namespace {

// The adapters in the forms that kernels/lora_linear.h describes; each is packed when it is first asked for.
class Adapters {
 public:
  // For a base of the given type.
  Adapters(at::ScalarType type, const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
           double scaling)
      : rank(lora_B.size(1)),
        groups(lora_A.size(0) / rank),
        width(lora_B.size(0) / groups),
        scaling(scaling),
        parts(tile_parts(lora_A, lora_B)),
        given_a_(lora_A),
        given_b_(lora_B),
        type_(acc_type(type)) {
    for (size_t i = 0; i < enable_lora.size(); ++i) {
      if (enable_lora[i]) columns.push_back(static_cast<int64_t>(i) * width);
    }
  }

  at::TensorOptions options() const { return given_a_.options().dtype(type_); }

  const at::Tensor& lora_A() {  // [groups * rank, in_features]
    if (!a_.defined()) a_ = as_type(given_a_, type_).contiguous();
    return a_;
  }

  const at::Tensor& lora_A_t() {  // [in_features, groups * rank]
    if (!a_t_.defined()) a_t_ = transposed(lora_A(), 1);
    return a_t_;
  }

  const at::Tensor& lora_B() {  // [groups * width, rank]
    if (!b_.defined()) b_ = as_type(given_b_, type_).contiguous();
    return b_;
  }

  const at::Tensor& lora_B_t() {  // [groups * rank, width]
    if (!b_t_.defined()) b_t_ = transposed(lora_B(), groups);
    return b_t_;
  }

  // The right operands of the products in tiles, of the same names (kernels/tiles.h).
  at::Tensor lora_A_t_tiles() { return pack_tiles(a_for_tiles(), 1, parts, false); }
  at::Tensor lora_B_t_tiles() { return pack_tiles(b_for_tiles(), groups, parts, true); }
  at::Tensor lora_A_tiles() { return pack_tile_lines(a_for_tiles(), groups, parts, true); }
  at::Tensor lora_B_tiles() { return pack_tile_lines(b_for_tiles(), groups, parts, false); }

  const int64_t rank, groups, width;
  const double scaling;
  const int parts;                       // Of a value in tiles.
  c10::SmallVector<int64_t, 4> columns;  // Where each group's output begins.

 private:
  // Packed as they are if they are bfloat16.
  at::Tensor a_for_tiles() { return parts == 1 ? given_a_.contiguous() : lora_A(); }
  at::Tensor b_for_tiles() { return parts == 1 ? given_b_.contiguous() : lora_B(); }

  const at::Tensor given_a_, given_b_;
  const at::ScalarType type_;
  at::Tensor a_, b_, a_t_, b_t_;
};

void fill_problem(LoraProblem& problem, const Adapters& adapters, const at::Tensor& x, int64_t out_features,
                  const Dropout& dropout) {
  set_input(problem, x, x.size(0), out_features);
  problem.rank = adapters.rank;
  problem.groups = adapters.groups;
  problem.width = adapters.width;
  problem.columns = adapters.columns.data();
  problem.scaling = adapters.scaling;
  problem.dropout = dropout;
  constexpr int64_t kWorthTiles = 128;  // At ranks of 8 to 64 alike.
  if (uses_tiles(x, kWorthTiles)) problem.parts = adapters.parts;
}

// One row of scratch memory for each thread that `tasks` can occupy.
at::Tensor make_workspace(const LoraProblem& problem, bool backward, int64_t tasks, const at::Tensor& like) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  const int64_t elements = LoraWorkspace(problem, backward).elements();
  return at::empty({threads, elements}, like.options().dtype(acc_type(like.scalar_type())));
}

// What reading and writing an element costs beside its r multiply-adds, in multiply-adds: measured on one core
// with AVX-512. W' is a new tensor and comes from farther away than the block of y that has just been multiplied.
constexpr int64_t kMergeTraffic = 30, kBranchTraffic = 4;

// `row_elements`: how many elements of each row the branch touches that merging spares.
bool merging_is_cheaper(const FrozenWeight& frozen, const Adapters& adapters, const Dropout& dropout, int64_t m,
                        int64_t row_elements) {
  const at::ScalarType type = frozen.weight.scalar_type();
  if (frozen.is_quantized() || dropout.threshold != 0 || acc_type(type) != type) return false;
  const int64_t merge = frozen.weight.numel() * (adapters.rank + kMergeTraffic);
  const int64_t branch = m * row_elements * (adapters.rank + kBranchTraffic);
  return merge < branch;
}

// W + s B A as a new tensor, in W's layout: the rows of the physical matrix are summed, so that a transposed
// weight (Conv1D) costs the same.
at::Tensor merged_weight(const at::Tensor& weight, Adapters& adapters) {
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  const at::Tensor source = transposed ? weight.t() : weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor target = at::empty(source.sizes(), source.options());
  if (adapters.groups * adapters.width != weight.size(0)) target.copy_(source);
  const at::Tensor scaled = (transposed ? adapters.lora_A_t() : adapters.lora_B()).mul(adapters.scaling);
  const auto& kernels = lora_kernels(weight.scalar_type());
  for (int64_t g = 0; g < adapters.groups; ++g) {
    const int64_t dim = transposed ? 1 : 0;
    const at::Tensor from = source.narrow(dim, adapters.columns[g], adapters.width);
    const at::Tensor to = target.narrow(dim, adapters.columns[g], adapters.width);
    const at::Tensor left = transposed ? scaled.narrow(1, g * adapters.rank, adapters.rank)
                                       : scaled.narrow(0, g * adapters.width, adapters.width);
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

// Whether y and grad_x begin as the branch, to which the large product is added: a pass less over them. Not where they
// would be rounded in between, nor where the product comes in panels.
bool branch_goes_first(const at::Tensor& rows, const FrozenWeight& frozen) {
  const at::ScalarType type = rows.scalar_type();
  return rows.size(0) >= kLoraFewRows && acc_type(type) == type && !frozen.is_quantized();
}

// y += branch; with `starts`, y = bias + branch.
void add_branch(const at::Tensor& y, const at::Tensor& rows, Adapters& adapters, const Dropout& dropout,
                bool starts = false, const at::Tensor& bias = {}) {
  const int64_t m = rows.size(0);
  if (m == 0) return;
  LoraForward problem{};
  fill_problem(problem, adapters, rows, y.size(1), dropout);
  at::Tensor lora_A_t_tiles, lora_B_t_tiles;
  if (problem.parts) {
    problem.block = std::min(m, tile_block_rows(rows.size(1) + y.size(1), kTileForwardRows));
    lora_A_t_tiles = adapters.lora_A_t_tiles();
    lora_B_t_tiles = adapters.lora_B_t_tiles();
    problem.lora_A_t_tiles = lora_A_t_tiles.const_data_ptr();
    problem.lora_B_t_tiles = lora_B_t_tiles.const_data_ptr();
  } else if (problem.few_rows) {
    problem.lora_A = adapters.lora_A().const_data_ptr();
    problem.lora_B = adapters.lora_B().const_data_ptr();
  } else {
    problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
    problem.lora_B_t = adapters.lora_B_t().const_data_ptr();
  }
  problem.y = y.data_ptr();
  problem.y_stride = y.stride(0);
  problem.source = starts ? data_or_null(bias) : problem.y;
  problem.source_stride = starts ? 0 : problem.y_stride;
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  const auto& kernels = lora_kernels(rows.scalar_type());
  run_tasks(blocks, make_workspace(problem, false, blocks, rows), [&](int64_t begin, int64_t end, void* memory) {
    kernels.forward(problem, begin * block, std::min(m, end * block), memory);
  });
}

// The gradients of the factors in the accumulation type; a gradient that was not asked for is undefined.
struct FactorGrads {
  at::Tensor lora_A, lora_B;
};

// `grad_x` gets the branch's part, or with `starts_grad_x` is it; undefined where it is not asked for.
FactorGrads branch_backward(const at::Tensor& grad_rows, const at::Tensor& rows, const at::Tensor& grad_x,
                            bool starts_grad_x, Adapters& adapters, const Dropout& dropout, bool needs_A,
                            bool needs_B) {
  const int64_t m = rows.size(0), k = rows.size(1), groups = adapters.groups, rank = adapters.rank;
  FactorGrads grads;
  if (m == 0) {
    if (needs_A) grads.lora_A = at::zeros_like(adapters.lora_A());
    if (needs_B) grads.lora_B = at::zeros_like(adapters.lora_B());
    return grads;
  }
  LoraBackward problem{};
  fill_problem(problem, adapters, rows, grad_rows.size(1), dropout);
  at::Tensor lora_A_t_tiles, lora_A_tiles, lora_B_tiles;
  if (problem.parts) {
    problem.block = std::min(m, tile_block_rows(k + grad_rows.size(1), kTileMostRows));
    if (needs_B) lora_A_t_tiles = adapters.lora_A_t_tiles();
    if (grad_x.defined()) lora_A_tiles = adapters.lora_A_tiles();
    if (needs_A || grad_x.defined()) lora_B_tiles = adapters.lora_B_tiles();
    problem.lora_A_t_tiles = data_or_null(lora_A_t_tiles);
    problem.lora_A_tiles = data_or_null(lora_A_tiles);
    problem.lora_B_tiles = data_or_null(lora_B_tiles);
  } else {
    problem.lora_A = adapters.lora_A().const_data_ptr();
    problem.lora_B = adapters.lora_B().const_data_ptr();
  }
  if (needs_B && !problem.few_rows && !problem.parts) problem.lora_A_t = adapters.lora_A_t().const_data_ptr();
  problem.grad_y = grad_rows.const_data_ptr();
  problem.grad_y_stride = grad_rows.stride(0);
  problem.grad_x = grad_x.defined() ? grad_x.data_ptr() : nullptr;
  problem.grad_x_stride = k;
  problem.starts_grad_x = starts_grad_x;
  problem.needs_A = needs_A;
  problem.needs_B = needs_B;

  const int64_t chunks = count_factor_chunks(m, rank);
  const ChunkSums grad_A(needs_A, chunks, {groups * rank, k}, adapters.options()),
      grad_B(needs_B, chunks, {groups * adapters.width, rank}, adapters.options());
  const auto& kernels = lora_kernels(rows.scalar_type());
  run_tasks(chunks, make_workspace(problem, true, chunks, rows), [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernels.backward(problem, chunk * m / chunks, (chunk + 1) * m / chunks, grad_A.of_chunk(chunk),
                       grad_B.of_chunk(chunk), memory);
    }
  });
  if (needs_A) grads.lora_A = grad_A.total();
  if (needs_B) grads.lora_B = grad_B.total();
  if (needs_B && !problem.few_rows) {
    // Summed as [groups, rank, width], under the sizes of the factor.
    grads.lora_B = transposed(grads.lora_B.view({groups * rank, adapters.width}), groups);
  }
  return grads;
}

}  // namespace

at::Tensor lora_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora,
                        double scaling, double dropout_p, const std::optional<at::Tensor>& seed,
                        const std::optional<at::Tensor>& weight_scale) {
  check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  const at::Tensor rows = as_rows(x);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const FrozenWeight frozen(weight, weight_scale);
  Adapters adapters(x.scalar_type(), lora_A, lora_B, enable_lora, scaling);
  if (merging_is_cheaper(frozen, adapters, dropout, rows.size(0), rows.size(1) + lora_B.size(0))) {
    const FrozenWeight merged(merged_weight(weight, adapters), std::nullopt);
    return with_leading_sizes(merged.product(rows, bias), x);
  }
  const bool covers = adapters.groups * adapters.width == weight.size(0);
  if (!branch_goes_first(rows, frozen) || !covers) {
    const at::Tensor y = frozen.product(rows, bias);
    add_branch(y, rows, adapters, dropout);
    return with_leading_sizes(y, x);
  }
  const at::Tensor y = at::empty({rows.size(0), weight.size(0)}, x.options());
  add_branch(y, rows, adapters, dropout, true, bias ? bias->contiguous() : at::Tensor());
  add_product(y, rows, weight.t());
  return with_leading_sizes(y, x);
}

std::vector<at::Tensor> lora_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& lora_A, const at::Tensor& lora_B,
                                      at::ArrayRef<bool> enable_lora, double scaling, double dropout_p,
                                      const std::optional<at::Tensor>& seed, std::array<bool, 4> needs,
                                      const std::optional<at::Tensor>& weight_scale) {
  check_lora(x, weight, std::nullopt, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale);
  check_lora_grad(grad_y, x, weight);
  const auto [needs_x, needs_bias, needs_A, needs_B] = needs;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const Dropout dropout = make_dropout(dropout_p, seed);
  const FrozenWeight frozen(weight, weight_scale);
  Adapters adapters(x.scalar_type(), lora_A, lora_B, enable_lora, scaling);

  std::vector<at::Tensor> grads;
  at::Tensor grad_x;
  const bool merge = needs_x && merging_is_cheaper(frozen, adapters, dropout, rows.size(0), rows.size(1));
  const bool branch_first = needs_x && !merge && branch_goes_first(rows, frozen);
  if (branch_first) {
    grad_x = at::empty(rows.sizes(), rows.options());
  } else if (needs_x) {
    grad_x = merge ? at::mm(grad_rows, merged_weight(weight, adapters)) : frozen.product_backward(grad_rows);
  }
  FactorGrads factors;
  if (needs_A || needs_B || (needs_x && !merge)) {
    factors = branch_backward(grad_rows, rows, merge ? at::Tensor() : grad_x, branch_first, adapters, dropout, needs_A,
                              needs_B);
  }
  if (branch_first) add_product(grad_x, grad_rows, weight);

  if (needs_x) grads.push_back(with_leading_sizes(grad_x, x));
  if (needs_bias) grads.push_back(grad_rows.sum(0));
  if (needs_A) grads.push_back(as_type(factors.lora_A, lora_A.scalar_type()));
  if (needs_B) grads.push_back(as_type(factors.lora_B, lora_B.scalar_type()));
  return grads;
}

}  // namespace peft_ext
