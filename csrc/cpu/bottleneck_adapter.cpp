// The bottleneck adapter on the CPU: one pass over blocks of rows, whose hidden rows never leave the cache. The
// factors are transposed once a call, so that the kernels' products read them in order.
//
// Threads split the rows. The parameters' gradients are summed over a number of row chunks that depends on the sizes
// alone, so that a result does not depend on the number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "common/bottleneck_checks.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

Activation activation_of(c10::string_view name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new") return Activation::kGeluNew;
  return name == "silu" ? Activation::kSilu : Activation::kTanh;
}

NormPlace norm_of(c10::string_view name) {
  return name == "none" ? NormPlace::kNone : name == "pre" ? NormPlace::kPre : NormPlace::kPost;
}

at::Tensor undefined_or(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor ? as_type(*tensor, type).contiguous() : at::Tensor();
}

// The adapter in the accumulation type, a pre-norm's weight and bias folded into the down projection:
// (n w + v) D^T + b = n (D w)^T + (b + D v).
struct Factors {
  Factors(const BottleneckTensors& adapter, NormPlace norm, at::ScalarType type)
      : down(as_type(adapter.down_weight, type).contiguous()),
        up(as_type(adapter.up_weight, type).contiguous()),
        norm_weight(undefined_or(adapter.norm_weight, type)),
        norm_bias(undefined_or(adapter.norm_bias, type)) {
    constexpr int64_t kVector = 16;
    const int64_t width = down.size(0), features = down.size(1);
    hidden_stride = (width + kVector) / kVector * kVector;
    down_bias = at::zeros({hidden_stride}, down.options());
    if (adapter.down_bias) down_bias.narrow(0, 0, width).copy_(*adapter.down_bias);
    if (norm == NormPlace::kPre) {
      down_bias.narrow(0, 0, width).add_(at::mv(down, norm_bias));
      down = down.mul(norm_weight);
    }
    const auto& kernels = bottleneck_kernels(type);
    down_t = at::empty({features, width}, down.options());
    kernels.transpose(down.const_data_ptr(), width, features, down_t.data_ptr());
    up_t = at::empty({width + 1, features}, down.options());
    kernels.transpose(up.const_data_ptr(), features, width, up_t.data_ptr());
    if (adapter.up_bias) {
      up_t[width].copy_(*adapter.up_bias);
    } else {
      up_t[width].zero_();
    }
  }

  int64_t hidden_stride;
  at::Tensor down, up, norm_weight, norm_bias, down_bias, down_t, up_t;
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
  problem.features = rows.size(1);
  problem.block = block_rows(problem.features);
  problem.width = factors.down.size(0);
  problem.hidden_stride = factors.hidden_stride;
  problem.scaling = scaling;
  problem.eps = eps;
  problem.down_t = factors.down_t.const_data_ptr();
  problem.down_bias = factors.down_bias.const_data_ptr();
  problem.up_t = factors.up_t.const_data_ptr();
  if (norm == NormPlace::kPost) {
    problem.norm_weight = factors.norm_weight.const_data_ptr();
    problem.norm_bias = factors.norm_bias.const_data_ptr();
  }
  problem.x = rows.const_data_ptr();
  problem.x_stride = rows.stride(0);
}

at::Tensor make_workspace(const BottleneckProblem& problem, int64_t tasks, const at::TensorOptions& options) {
  return at::empty({std::min<int64_t>(tasks, at::get_num_threads()), BottleneckWorkspace(problem).elements()}, options);
}

// Row chunks over which the parameters' gradients are summed: two, so that two threads share a small batch, and no
// more than one for 512 rows, so that the partial sums stay small beside x.
int64_t count_chunks(int64_t rows) {
  constexpr int64_t kShared = 32, kChunk = 512, kMost = 16;
  return rows < kShared ? 1 : std::clamp<int64_t>(rows / kChunk, 2, kMost);
}

at::Tensor bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight, const OptionalTensor& down_bias,
                              const at::Tensor& up_weight, const OptionalTensor& up_bias,
                              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                              c10::string_view activation, c10::string_view norm, bool residual, double scaling,
                              double eps) {
  const BottleneckTensors adapter{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, adapter, activation, norm, scaling, eps);
  const at::Tensor rows = as_rows(x), y = at::empty(rows.sizes(), rows.options());
  const int64_t m = rows.size(0);
  if (m == 0) return with_leading_sizes(y, x);
  const Factors factors(adapter, norm_of(norm), acc_type(x.scalar_type()));
  BottleneckForward problem{};
  fill_problem(problem, factors, rows, activation_of(activation), norm_of(norm), residual, scaling, eps);
  const int64_t share = (m + at::get_num_threads() - 1) / at::get_num_threads();
  problem.block = std::min(problem.block, (share + kTile - 1) / kTile * kTile);
  problem.y = y.data_ptr();
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  const auto& kernels = bottleneck_kernels(x.scalar_type());
  run_tasks(blocks, make_workspace(problem, blocks, factors.down.options()),
            [&](int64_t begin, int64_t end, void* memory) {
              kernels.forward(problem, begin * block, std::min(m, end * block), memory);
            });
  return with_leading_sizes(y, x);
}

std::vector<at::Tensor> bottleneck_adapter_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& down_weight, const OptionalTensor& down_bias,
                                                    const at::Tensor& up_weight, const OptionalTensor& up_bias,
                                                    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                                    c10::string_view activation, c10::string_view norm, bool residual,
                                                    double scaling, double eps, std::array<bool, 7> needs) {
  const BottleneckTensors adapter{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, adapter, activation, norm, scaling, eps);
  TORCH_CHECK_VALUE(grad_y.sizes() == x.sizes() && grad_y.scalar_type() == x.scalar_type(), "grad_y must be like x, ",
                    x.sizes(), ", but is ", grad_y.sizes());
  const auto [needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_norm, needs_norm_bias] = needs;
  const NormPlace place = norm_of(norm);
  const bool pre = place == NormPlace::kPre;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const int64_t m = rows.size(0), features = rows.size(1), width = down_weight.size(0);
  const Factors factors(adapter, place, acc_type(x.scalar_type()));
  const auto options = factors.down.options();
  const at::Tensor grad_x = needs_x ? at::empty(rows.sizes(), rows.options()) : at::Tensor();

  BottleneckBackward problem{};
  fill_problem(problem, factors, rows, activation_of(activation), place, residual, scaling, eps);
  problem.down = factors.down.const_data_ptr();
  problem.up = factors.up.const_data_ptr();
  problem.grad_y = grad_rows.const_data_ptr();
  problem.grad_y_stride = grad_rows.stride(0);
  problem.grad_x = needs_x ? grad_x.data_ptr() : nullptr;
  problem.needs_down = needs_down || (pre && needs_norm);
  problem.needs_down_bias = needs_down_bias || (pre && needs_norm_bias);
  problem.needs_up = needs_up || needs_up_bias;
  const BottleneckGrads layout(problem);
  const int64_t chunks = count_chunks(m);
  const at::Tensor partial = at::empty({chunks, layout.elements}, options);
  if (m == 0) partial.zero_();
  const auto& kernels = bottleneck_kernels(x.scalar_type());
  run_tasks(chunks, make_workspace(problem, chunks, options), [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t chunk = m == 0 ? end : begin; chunk < end; ++chunk) {
      auto* sums = static_cast<char*>(partial.data_ptr()) + chunk * layout.elements * partial.element_size();
      kernels.backward(problem, chunk * m / chunks, (chunk + 1) * m / chunks, sums, memory);
    }
  });

  const auto sum = [&](int64_t begin, int64_t count) {
    const at::Tensor part = partial.narrow(1, begin, count);
    return chunks == 1 ? part[0] : part.sum(0);
  };
  const auto type = down_weight.scalar_type();
  std::vector<at::Tensor> grads;
  const auto push = [&](const at::Tensor& grad) { grads.push_back(as_type(grad, type).contiguous().clone()); };
  at::Tensor grad_down, grad_bias, grad_up;
  if (problem.needs_down) grad_down = sum(layout.down, width * features).view({width, features});
  if (needs_down || problem.needs_down_bias) grad_bias = sum(layout.down_bias, width);
  if (problem.needs_up) grad_up = sum(layout.up_t, (width + 1) * features).view({width + 1, features});
  if (needs_x) grads.push_back(with_leading_sizes(grad_x, x));
  if (needs_down) {
    // through the folded norm: the kernel's D is D w, and its b is b + D v
    push(pre ? grad_down.mul(factors.norm_weight).addcmul(grad_bias.unsqueeze(1), factors.norm_bias) : grad_down);
  }
  if (needs_down_bias) push(grad_bias);
  if (needs_up) push(grad_up.narrow(0, 0, width).t());
  if (needs_up_bias) push(grad_up[width]);
  const at::Tensor down = pre ? as_type(down_weight, acc_type(x.scalar_type())) : at::Tensor();
  if (needs_norm) push(pre ? grad_down.mul(down).sum(0) : sum(layout.norm_weight, features));
  if (needs_norm_bias) push(pre ? at::mv(down.t(), grad_bias) : sum(layout.norm_bias, features));
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext
