// The bottleneck adapter on the CPU: one pass over blocks of rows, which stay in the cache between the products.
//
// Threads split the rows. The parameters' gradients are summed over a number of row chunks that depends on the sizes
// alone, so that a result does not depend on the number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/mv.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "common/bottleneck_checks.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

NormPlace norm_of(c10::string_view name) {
  return name == "none" ? NormPlace::kNone : name == "pre" ? NormPlace::kPre : NormPlace::kPost;
}

// The parts of a factor's values in tiles; 0: no products run on them.
int count_tile_parts(const BottleneckTensors& adapter, NormPlace norm, const at::Tensor& rows) {
  constexpr int64_t kWorthTiles = 16;
  if (norm != NormPlace::kNone || !uses_tiles(rows, kWorthTiles)) return 0;
  return tile_parts(adapter.down_weight, adapter.up_weight);
}

// The adapter in the accumulation type, but weights that are packed as they are; a pre-norm's weight and bias folded
// into the down projection: (n w + v) D^T + b = n (D w)^T + (b + D v).
struct Factors {
  Factors(const BottleneckTensors& adapter, NormPlace norm, at::ScalarType type, int tile_parts) : parts(tile_parts) {
    const at::ScalarType weights = parts == 1 ? at::kBFloat16 : type;
    down = as_type(adapter.down_weight, weights).contiguous();
    up = as_type(adapter.up_weight, weights).contiguous();
    down_bias = undefined_or(adapter.down_bias, type);
    up_bias = undefined_or(adapter.up_bias, type);
    norm_weight = undefined_or(adapter.norm_weight, type);
    norm_bias = undefined_or(adapter.norm_bias, type);
    if (norm != NormPlace::kPre) return;
    const at::Tensor shift = at::mv(down, norm_bias);
    down_bias = down_bias.defined() ? down_bias.add(shift) : shift;
    down = down.mul(norm_weight);
  }

  int parts;
  at::Tensor down, down_bias, up, up_bias, norm_weight, norm_bias, down_t, up_t;
};

constexpr int64_t kTile = 8;

// Rows of a block: whole register tiles, at most what stays in the second-level cache beside the factors.
int64_t block_rows(int64_t features) {
  constexpr int64_t kElements = 48 * 1024, kMost = 64;
  return std::clamp<int64_t>(kElements / features / kTile * kTile, kTile, kMost);
}

void fill_problem(BottleneckProblem& problem, const Factors& factors, const at::Tensor& rows, Activation activation,
                  NormPlace norm, bool residual, double scaling, double eps) {
  problem.activation = activation;
  problem.norm = norm;
  problem.residual = residual;
  problem.widen = acc_type(rows.scalar_type()) != rows.scalar_type();
  constexpr int64_t kVector = 16;
  problem.features = rows.size(1);
  problem.block = std::min(block_rows(problem.features), std::max<int64_t>(rows.size(0), 1));
  problem.width = factors.down.size(0);
  problem.hidden_stride = (problem.width + kVector) / kVector * kVector;
  problem.scaling = scaling;
  problem.eps = eps;
  problem.down = factors.down.const_data_ptr();
  problem.down_bias = data_or_null(factors.down_bias);
  problem.up = factors.up.const_data_ptr();
  problem.up_bias = data_or_null(factors.up_bias);
  if (norm == NormPlace::kPost) {
    problem.norm_weight = factors.norm_weight.const_data_ptr();
    problem.norm_bias = factors.norm_bias.const_data_ptr();
  }
  problem.x = rows.const_data_ptr();
  problem.x_stride = rows.stride(0);
  problem.parts = factors.parts;
}

// Up to so many rows the factors are transposed a panel at a time: whole, they would take more memory than the result.
constexpr int64_t kFewRows = 128;

void pack(BottleneckProblem& problem, Factors& factors, const BottleneckKernels& kernels) {
  factors.down_t = at::empty({problem.features, problem.width}, factors.down.options());
  factors.up_t = at::empty({problem.width + 1, problem.features}, factors.down.options());
  kernels.pack(problem, factors.down_t.data_ptr(), factors.up_t.data_ptr());
  problem.down_t = factors.down_t.const_data_ptr();
  problem.up_t = factors.up_t.const_data_ptr();
}

at::Tensor make_workspace(const BottleneckProblem& problem, bool backward, int64_t tasks,
                          const at::TensorOptions& options) {
  return at::empty({std::min<int64_t>(tasks, at::get_num_threads()), BottleneckWorkspace(problem, backward).elements()},
                   options);
}

// Row chunks over which the parameters' gradients are summed: the partial sums stay small beside x.
int64_t count_chunks(int64_t rows) {
  constexpr int64_t kChunk = 256, kMost = 16;
  return std::clamp<int64_t>(rows / kChunk, 1, kMost);
}

std::tuple<at::Tensor, at::Tensor> bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight,
                                                      const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                      const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                      const OptionalTensor& norm_bias, c10::string_view activation,
                                                      c10::string_view norm, bool residual, double scaling, double eps,
                                                      bool keep_hidden) {
  const BottleneckTensors adapter{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, adapter, activation, norm, scaling, eps);
  const at::Tensor rows = as_rows(x), y = at::empty(rows.sizes(), rows.options());
  const int64_t m = rows.size(0), width = down_weight.size(0);
  const auto type = acc_type(x.scalar_type());
  const auto options = x.options().dtype(type);
  const NormPlace place = norm_of(norm);
  const at::Tensor hidden =
      keep_hidden ? with_leading_sizes(at::empty({m, width}, options), x) : at::empty({0}, options);
  if (m == 0) return {with_leading_sizes(y, x), hidden};
  Factors factors(adapter, place, type, count_tile_parts(adapter, place, rows));
  BottleneckForward problem{};
  fill_problem(problem, factors, rows, activation_of(activation), place, residual, scaling, eps);
  const auto& kernels = bottleneck_kernels(x.scalar_type());
  at::Tensor down_t_tiles, up_t_tiles, up_bias_scaled;
  if (problem.parts) {
    problem.block = std::min(m, tile_block_rows(2 * problem.features, kTileForwardRows));
    down_t_tiles = pack_tiles(factors.down, 1, factors.parts, false);
    up_t_tiles = pack_tiles(factors.up, 1, factors.parts, true);
    if (factors.up_bias.defined()) up_bias_scaled = factors.up_bias.mul(scaling);
    problem.up_bias = data_or_null(up_bias_scaled);
    problem.down_t_tiles = down_t_tiles.const_data_ptr();
    problem.up_t_tiles = up_t_tiles.const_data_ptr();
  } else if (m > kFewRows) {
    pack(problem, factors, kernels);
  }
  const int64_t share = (m + at::get_num_threads() - 1) / at::get_num_threads();
  problem.block = std::min(problem.block, padded(share, problem.parts ? kTileInner : kTile));
  problem.y = y.data_ptr();
  problem.hidden = keep_hidden ? hidden.data_ptr() : nullptr;
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  run_tasks(blocks, make_workspace(problem, false, blocks, options), [&](int64_t begin, int64_t end, void* memory) {
    kernels.forward(problem, begin * block, std::min(m, end * block), memory);
  });
  return {with_leading_sizes(y, x), hidden};
}

std::vector<at::Tensor> bottleneck_adapter_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& hidden, const at::Tensor& down_weight,
                                                    const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                    const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                    const OptionalTensor& norm_bias, c10::string_view activation,
                                                    c10::string_view norm, bool residual, double scaling, double eps,
                                                    std::array<bool, 7> needs) {
  const BottleneckTensors adapter{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, adapter, activation, norm, scaling, eps);
  check_bottleneck_saved(grad_y, x, hidden, down_weight.size(0));
  const auto type = acc_type(x.scalar_type());
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const int64_t m = rows.size(0), features = rows.size(1), width = down_weight.size(0);
  const auto [needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_norm, needs_norm_bias] = needs;
  const NormPlace place = norm_of(norm);
  const bool pre = place == NormPlace::kPre, post = place == NormPlace::kPost;
  Factors factors(adapter, place, type, count_tile_parts(adapter, place, rows));
  const auto options = x.options().dtype(type);
  const at::Tensor grad_x = needs_x ? at::empty(rows.sizes(), rows.options()) : at::Tensor();
  const at::Tensor hidden_rows = hidden.contiguous();

  BottleneckBackward problem{};
  fill_problem(problem, factors, rows, activation_of(activation), place, residual, scaling, eps);
  problem.hidden = hidden_rows.const_data_ptr();
  problem.grad_y = grad_rows.const_data_ptr();
  problem.grad_y_stride = grad_rows.stride(0);
  problem.grad_x = needs_x ? grad_x.data_ptr() : nullptr;
  const auto& kernels = bottleneck_kernels(x.scalar_type());
  at::Tensor up_tiles, down_tiles;
  if (problem.parts) {
    problem.block = std::min(m, tile_block_rows(2 * problem.features, kTileMostRows));
    if (needs_x || needs_down || needs_down_bias) up_tiles = pack_tile_lines(factors.up, 1, factors.parts, false);
    if (needs_x) down_tiles = pack_tile_lines(factors.down, 1, factors.parts, true);
    problem.up_tiles = data_or_null(up_tiles);
    problem.down_tiles = data_or_null(down_tiles);
  } else if (post && m > kFewRows) {
    pack(problem, factors, kernels);
  }
  const int64_t chunks = count_chunks(m);
  // A pre-norm's gradients, and that of D through it, are made of those of the folded D and b.
  const ChunkSums down(needs_down || (pre && needs_norm), chunks, {width, features}, options),
      down_b(needs_down_bias || (pre && (needs_down || needs_norm_bias)), chunks, {width}, options),
      up(needs_up, chunks, {features, width}, options), up_b(needs_up_bias, chunks, {features}, options),
      norm_w(post && needs_norm, chunks, {features}, options),
      norm_b(post && needs_norm_bias, chunks, {features}, options);
  run_tasks(chunks, make_workspace(problem, true, chunks, options), [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const BottleneckGrads sums{down.of_chunk(chunk), down_b.of_chunk(chunk), up.of_chunk(chunk),
                                 up_b.of_chunk(chunk), norm_w.of_chunk(chunk), norm_b.of_chunk(chunk)};
      kernels.backward(problem, chunk * m / chunks, (chunk + 1) * m / chunks, sums, memory);
    }
  });

  std::vector<at::Tensor> grads;
  const auto push = [&](const at::Tensor& grad) { grads.push_back(as_type(grad, down_weight.scalar_type())); };
  const at::Tensor grad_down = down.sums.defined() ? down.total() : at::Tensor();
  const at::Tensor grad_bias = down_b.sums.defined() ? down_b.total() : at::Tensor();
  if (needs_x) grads.push_back(with_leading_sizes(grad_x, x));
  if (needs_down) {
    // through the folded norm: the kernel's D is D w, and its b is b + D v
    push(pre ? grad_down.mul(factors.norm_weight).addcmul(grad_bias.unsqueeze(1), factors.norm_bias) : grad_down);
  }
  if (needs_down_bias) push(grad_bias);
  if (needs_up) push(up.total());
  if (needs_up_bias) push(up_b.total());
  const at::Tensor unfolded = pre ? as_type(down_weight, type) : at::Tensor();
  if (needs_norm) push(pre ? grad_down.mul(unfolded).sum(0) : norm_w.total());
  if (needs_norm_bias) push(pre ? at::mv(unfolded.t(), grad_bias) : norm_b.total());
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext
