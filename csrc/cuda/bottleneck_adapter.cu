// The bottleneck adapter on the device: y = x + s up(act(down(LN(x)))) and its other forms.
//
//   forward   hidden = n D^T + b;  a = act(hidden);  branch = a U^T;  y = x + s (branch + c), or x + LN(s (branch + c))
//   backward  g = s grad_y, or LN's gradient of it;  grad_U = g^T a;  grad_hidden = (g U) act'(hidden);
//             grad_D = grad_hidden^T n;  grad_n = grad_hidden D;  grad_x = grad_y + grad_n, or through LN
//
// Shapes    x, y [M, features], hidden, a [M, width]. n is x, or LN(x) for a pre-norm.
// Types     The products are at::'s and accumulate in float32 (float64 for float64). Where x and adapter share a half
//           precision, so do their inputs; a float32 adapter of a half-precision x is multiplied in float32. What is
//           between the products is computed in the accumulation type, and y is rounded once.
// Kernels   one for bias and activation, one for its derivative, one for the end of the forward. The first two take a
//           thread an element, the last a warp a row.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <c10/util/string_view.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/bottleneck_checks.h"
#include "common/rows.h"
#include "cuda/gemm.h"
#include "cuda/scope.h"
#include "cuda/vectors.h"

namespace peft_ext {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

enum class Activation { kRelu, kGelu, kGeluNew, kSilu, kTanh };

Activation activation_of(c10::string_view name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new") return Activation::kGeluNew;
  return name == "silu" ? Activation::kSilu : Activation::kTanh;
}

// act(x), and its derivative.
template <class C>
__device__ inline C activate(Activation kind, C x, C& derivative) {
  switch (kind) {
    case Activation::kRelu:
      derivative = x > C(0) ? C(1) : x == x ? C(0) : x;
      return x > C(0) || x != x ? x : C(0);
    case Activation::kGelu: {
      const C cdf = C(0.5) * (C(1) + erf(x * C(0.70710678118654752440)));
      derivative = cdf + x * C(0.39894228040143267794) * exp(C(-0.5) * x * x);
      return x * cdf;
    }
    case Activation::kGeluNew: {
      constexpr double kScale = 0.79788456080286535588, kCube = 0.044715;
      const C t = tanh(C(kScale) * (x + C(kCube) * x * x * x));
      derivative = C(0.5) * (C(1) + t) + C(0.5) * x * (C(1) - t * t) * C(kScale) * (C(1) + C(3 * kCube) * x * x);
      return C(0.5) * x * (C(1) + t);
    }
    case Activation::kSilu: {
      const C sigmoid = C(1) / (C(1) + exp(-x));
      derivative = sigmoid * (C(1) + x * (C(1) - sigmoid));
      return x * sigmoid;
    }
    default: {
      const C t = tanh(x);
      derivative = C(1) - t * t;
      return t;
    }
  }
}

constexpr int kThreads = 256;

// hidden += bias, in place; activated = act(hidden), of G.
template <class C, class G>
__global__ void __launch_bounds__(kThreads)
    add_bias_activate(C* hidden, const C* bias, G* activated, int64_t count, int64_t width, Activation kind) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const C value = bias ? hidden[i] + bias[i % width] : hidden[i];
    C derivative;
    hidden[i] = value;
    activated[i] = static_cast<G>(activate(kind, value, derivative));
  }
}

// grad = scale grad_activated act'(hidden), and activated = act(hidden), both of G.
template <class C, class G>
__global__ void __launch_bounds__(kThreads) activate_backward(const C* grad_activated, const C* hidden, G* grad,
                                                              G* activated, int64_t count, C scale, Activation kind) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    C derivative;
    activated[i] = static_cast<G>(activate(kind, hidden[i], derivative));
    grad[i] = static_cast<G>(scale * grad_activated[i] * derivative);
  }
}

constexpr int kWarps = 8, kVector = 4;

struct End {
  const void* branch;  // [rows, features] of the accumulation type, contiguous.
  const void* bias;    // Of the accumulation type; null for none.
  const void* x;       // Null without a residual.
  int64_t x_stride;
  void* y;
  int64_t rows, features;
  double scaling, eps;
  const void *norm_weight, *norm_bias;  // Of a post-norm, of the accumulation type; null without.
  bool aligned;
};

// y = x + s (branch + bias), or x + LN(s (branch + bias)).
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) finish_rows(const __grid_constant__ End p) {
  using C = Acc<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const C* branch = static_cast<const C*>(p.branch) + row * p.features;
  const C *bias = static_cast<const C*>(p.bias), *weight = static_cast<const C*>(p.norm_weight),
          *shift = static_cast<const C*>(p.norm_bias);
  const auto scaled = [&](int64_t k) { return static_cast<C>(p.scaling) * (bias ? branch[k] + bias[k] : branch[k]); };
  C mean = 0, inverse = 1;
  if (weight) {
    C sum = 0, squares = 0;
    for (int64_t k = lane; k < p.features; k += kWarp) sum += scaled(k);
    mean = warp_sum(sum) / static_cast<C>(p.features);
    for (int64_t k = lane; k < p.features; k += kWarp) squares += (scaled(k) - mean) * (scaled(k) - mean);
    inverse = rsqrt(warp_sum(squares) / static_cast<C>(p.features) + static_cast<C>(p.eps));
  }
  for (int64_t k = lane * kVector; k < p.features; k += kWarp * kVector) {
    C values[kVector] = {};
    if (p.x) {
      load_elements(values, static_cast<const T*>(p.x) + row * p.x_stride + k, p.features - k, p.aligned);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (k + i >= p.features) continue;
      values[i] += weight ? (scaled(k + i) - mean) * inverse * weight[k + i] + shift[k + i] : scaled(k + i);
    }
    store_elements(static_cast<T*>(p.y) + row * p.features + k, values, p.features - k, p.aligned);
  }
}

at::Tensor undefined_or(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor ? as_type(*tensor, type).contiguous() : at::Tensor();
}

const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// The adapter, and x, as the products take them.
struct Adapter {
  Adapter(const at::Tensor& rows, const BottleneckTensors& tensors, c10::string_view norm_place, double eps)
      : acc(acc_type(rows.scalar_type())),
        type(tensors.down_weight.scalar_type() == rows.scalar_type() ? rows.scalar_type() : acc),
        pre(norm_place == "pre"),
        post(norm_place == "post"),
        down(as_type(tensors.down_weight, type)),
        up(as_type(tensors.up_weight, type)),
        down_bias(undefined_or(tensors.down_bias, acc)),
        up_bias(undefined_or(tensors.up_bias, acc)),
        norm_weight(undefined_or(tensors.norm_weight, acc)),
        norm_bias(undefined_or(tensors.norm_bias, acc)) {
    if (!pre) {
      input = as_type(rows, type);
      return;
    }
    wide = as_type(rows, acc);
    std::tie(input, mean, inverse) = at::native_layer_norm(wide, {rows.size(1)}, norm_weight, norm_bias, eps);
    input = as_type(input, type);
  }

  at::ScalarType acc, type;  // Of the sums, and of the products' inputs.
  bool pre, post;
  at::Tensor down, up, down_bias, up_bias, norm_weight, norm_bias;
  at::Tensor input;                // n
  at::Tensor wide, mean, inverse;  // Of a pre-norm.
};

unsigned element_blocks(int64_t count) {
  return grid_size(blocks_for(count, kThreads), 1 << 16);
}

std::tuple<at::Tensor, at::Tensor> bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight,
                                                      const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                      const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                      const OptionalTensor& norm_bias, c10::string_view activation,
                                                      c10::string_view norm, bool residual, double scaling, double eps,
                                                      bool keep_hidden) {
  const BottleneckTensors tensors{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, tensors, activation, norm, scaling, eps);
  const OpScope scope(x);
  const at::Tensor rows = as_rows(x), y = at::empty(rows.sizes(), rows.options());
  const int64_t m = rows.size(0), features = rows.size(1), width = down_weight.size(0);
  const auto options = x.options().dtype(acc_type(x.scalar_type()));
  if (m == 0) {
    const at::Tensor none = at::empty({m, width}, options);
    return {with_leading_sizes(y, x), keep_hidden ? with_leading_sizes(none, x) : at::empty({0}, options)};
  }
  const Adapter adapter(rows, tensors, norm, eps);
  const at::Tensor hidden = mm_wide(adapter.input, adapter.down.t());
  const at::Tensor activated = at::empty(hidden.sizes(), adapter.input.options());
  dispatch_storage(adapter.type, [&](auto g) {
    using G = decltype(g);
    using C = Acc<G>;
    launch(add_bias_activate<C, G>, dim3(element_blocks(hidden.numel())), dim3(kThreads), 0, hidden.data_ptr<C>(),
           static_cast<const C*>(data_or_null(adapter.down_bias)), activated.data_ptr<G>(), hidden.numel(), width,
           activation_of(activation));
  });
  const at::Tensor branch = mm_wide(activated, adapter.up.t());
  End end{branch.const_data_ptr(), data_or_null(adapter.up_bias)};
  end.x = residual ? rows.const_data_ptr() : nullptr;
  end.x_stride = rows.stride(0);
  end.y = y.data_ptr();
  end.rows = m;
  end.features = features;
  end.scaling = scaling;
  end.eps = eps;
  end.norm_weight = adapter.post ? adapter.norm_weight.const_data_ptr() : nullptr;
  end.norm_bias = adapter.post ? adapter.norm_bias.const_data_ptr() : nullptr;
  end.aligned = is_aligned(rows, rows.stride(0), kVector) && is_aligned(y, features, kVector);
  dispatch_storage(x.scalar_type(), [&](auto t) {
    launch(finish_rows<decltype(t)>, dim3(grid_size(blocks_for(m, kWarps))), dim3(kWarps * kWarp), 0, end);
  });
  return {with_leading_sizes(y, x), keep_hidden ? with_leading_sizes(hidden, x) : at::empty({0}, options)};
}

std::vector<at::Tensor> bottleneck_adapter_backward(const at::Tensor& grad_y, const at::Tensor& x,
                                                    const at::Tensor& hidden, const at::Tensor& down_weight,
                                                    const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                    const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                    const OptionalTensor& norm_bias, c10::string_view activation,
                                                    c10::string_view norm, bool residual, double scaling, double eps,
                                                    std::array<bool, 7> needs) {
  const BottleneckTensors tensors{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, tensors, activation, norm, scaling, eps);
  check_bottleneck_saved(grad_y, x, hidden, down_weight.size(0));
  const OpScope scope(x);
  const auto [needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_norm, needs_norm_bias] = needs;
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const Adapter adapter(rows, tensors, norm, eps);
  const int64_t features = rows.size(1), width = down_weight.size(0);
  const at::Tensor kept = hidden.contiguous().view({rows.size(0), width});
  const at::Tensor grad_hidden = at::empty(kept.sizes(), adapter.input.options()),
                   activated = at::empty_like(grad_hidden);
  at::Tensor grad_branch = as_type(grad_rows, adapter.type), grad_norm, grad_norm_bias;
  const auto through_activation = [&](const at::Tensor& grad_activated, double scale) {
    if (kept.numel() == 0) return;
    dispatch_storage(adapter.type, [&](auto g) {
      using G = decltype(g);
      using C = Acc<G>;
      launch(activate_backward<C, G>, dim3(element_blocks(kept.numel())), dim3(kThreads), 0,
             grad_activated.const_data_ptr<C>(), kept.const_data_ptr<C>(), grad_hidden.data_ptr<G>(),
             activated.data_ptr<G>(), kept.numel(), static_cast<C>(scale), activation_of(activation));
    });
  };
  if (adapter.post) {
    through_activation(kept, 0.0);
    at::Tensor branch = mm_wide(activated, adapter.up.t());
    if (adapter.up_bias.defined()) branch = branch.add(adapter.up_bias);
    branch = branch.mul(scaling);
    const auto [normed, mean, inverse] =
        at::native_layer_norm(branch, {features}, adapter.norm_weight, adapter.norm_bias, eps);
    at::Tensor grad;
    std::tie(grad, grad_norm, grad_norm_bias) =
        at::native_layer_norm_backward(as_type(grad_rows, adapter.acc), branch, {features}, mean, inverse,
                                       adapter.norm_weight, adapter.norm_bias, {true, needs_norm, needs_norm_bias});
    grad_branch = as_type(grad, adapter.type);
  }
  through_activation(mm_wide(grad_branch, adapter.up), scaling);

  at::Tensor grad_x;
  if (adapter.pre && (needs_x || needs_norm || needs_norm_bias)) {
    at::Tensor grad;
    std::tie(grad, grad_norm, grad_norm_bias) = at::native_layer_norm_backward(
        mm_wide(grad_hidden, adapter.down), adapter.wide, {features}, adapter.mean, adapter.inverse,
        adapter.norm_weight, adapter.norm_bias, {needs_x, needs_norm, needs_norm_bias});
    if (needs_x) grad_x = residual ? grad.add(grad_rows) : grad;
  } else if (needs_x) {
    grad_x = residual && adapter.type == rows.scalar_type() ? at::addmm(grad_rows, grad_hidden, adapter.down)
                                                            : mm_wide(grad_hidden, adapter.down);
    if (residual && adapter.type != rows.scalar_type()) grad_x = grad_x.add(grad_rows);
  }

  std::vector<at::Tensor> grads;
  const auto push = [&](const at::Tensor& grad) { grads.push_back(as_type(grad, down_weight.scalar_type())); };
  const auto sum = [&](const at::Tensor& grad) { return grad.sum(0, false, adapter.acc); };
  if (needs_x) grads.push_back(with_leading_sizes(as_type(grad_x, x.scalar_type()), x));
  if (needs_down) push(mm_wide(grad_hidden.t(), adapter.input));
  if (needs_down_bias) push(sum(grad_hidden));
  if (needs_up) push(mm_wide(grad_branch.t(), activated).mul_(scaling));
  if (needs_up_bias) push(sum(grad_branch).mul_(scaling));
  if (needs_norm) push(grad_norm);
  if (needs_norm_bias) push(grad_norm_bias);
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext
