// The bottleneck adapter on the device: y = x + s up(act(down(LN(x)))) and its other forms.
//
//   forward   hidden = n D^T + b;  a = act(hidden);  branch = a U^T;  y = x + s (branch + c), or x + LN(s (branch + c))
//   backward  g = s grad_y, or LN's gradient of it;  grad_U = g^T a;  grad_hidden = (g U) act'(hidden);
//             grad_D = grad_hidden^T n;  grad_n = grad_hidden D;  grad_x = grad_y + grad_n, or through LN
//
// Shapes    x, y [M, features], hidden, a [M, width]. n is x, or LN(x) for a pre-norm.
// Types     The products are at::'s and accumulate in float32 (float64 for float64). Where x and adapter share a half
//           precision, so do their inputs, but behind a pre-norm; a float32 adapter of a half-precision x is multiplied
//           in float32. What is between the products is computed in the accumulation type, and y is rounded once.
// Kernels   expand_rows  y = x + s (act(hidden + b) U^T + c), and grad_x = grad_y + grad_hidden D: a block a tile of
//                        64 x 64 elements, so that x and y are passed over once; half precisions on tensor cores
//           finish_rows  the end of the forward with a post-norm, a warp a row; the activation and its derivative
//                        beside it, a thread an element
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/string_view.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/bottleneck_checks.h"
#include "common/tensors.h"
#include "cuda/gemm.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

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

// grad = scale grad_activated act'(hidden), and activated = scale act(hidden), both of G.
template <class C, class G>
__global__ void __launch_bounds__(kThreads) activate_backward(const C* grad_activated, const C* hidden, G* grad,
                                                              G* activated, int64_t count, C scale, Activation kind) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    C derivative;
    activated[i] = static_cast<G>(scale * activate(kind, hidden[i], derivative));
    grad[i] = static_cast<G>(scale * grad_activated[i] * derivative);
  }
}

constexpr int kTile = 64, kStep = 16, kNeighbours = 8, kFeaturePieces = kTile / kNeighbours;
// Of a step through the width: what fits into shared memory.
template <class G>
constexpr int kDepth = sizeof(G) == 2 ? 64 : 32;

struct Expansion {
  const void* in;      // [rows, width], contiguous: what the activation takes, of the accumulation type; else of G.
  const void* shift;   // Added to it first, of G; null for none.
  void* kept;          // What that gives; null for nothing.
  const void* factor;  // Contiguous: [features, width] with an activation, [width, features] without.
  const void* bias;    // Of G; null for none.
  const void* x;       // Null without a residual.
  int64_t x_stride;
  void* y;
  int64_t rows, features, width;
  double scaling;
  Activation kind;
  bool by_vectors;  // Whether in, kept, shift and factor can be read so, and all k and features are whole ones.
  bool bias_aligned, aligned;  // aligned: x and y.
};

template <class G>
struct TensorCoreOf {};
template <>
struct TensorCoreOf<c10::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct TensorCoreOf<c10::Half> {
  using type = __half;
};

// A thread's share of a step of `in` and of the factor, on its way from memory to shared memory.
template <class G, bool kActivate>
class Step {
 public:
  static constexpr int kPitch = kDepth<G> + (sizeof(G) == 2 ? 8 : 1);
  using Lines = G[kTile][kPitch];

  // By vectors, what is beyond is read at the last place within: store puts zeros beyond the width, and what is beyond
  // the rows or features goes into elements of y that are not there.
  __device__ void load(const Expansion& p, int64_t first_row, int64_t first_feature, int64_t first_k) {
    const In* in = static_cast<const In*>(p.in);
    const G* factor = static_cast<const G*>(p.factor);
    if (p.by_vectors) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int64_t row = min(first_row + line_of(i), p.rows - 1);
        load_whole(in_[i], in + row * p.width + min(first_k + k_of(i), p.width - kNeighbours));
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if constexpr (kActivate) {
          const int64_t feature = min(first_feature + line_of(i), p.features - 1);
          load_whole(factor_[i], factor + feature * p.width + min(first_k + k_of(i), p.width - kNeighbours));
        } else {
          const int64_t feature = min(first_feature + feature_of(i), p.features - kNeighbours);
          load_whole(factor_[i], factor + min(first_k + across_of(i), p.width - 1) * p.features + feature);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t row = first_row + line_of(i), k = first_k + k_of(i);
      load_elements(in_[i], in + row * p.width + k, row < p.rows ? p.width - k : 0, false);
      if constexpr (kActivate) {
        const int64_t feature = first_feature + line_of(i);
        load_elements(factor_[i], factor + feature * p.width + k, feature < p.features ? p.width - k : 0, false);
      } else {
        const int64_t feature = first_feature + feature_of(i), down = first_k + across_of(i);
        load_elements(factor_[i], factor + down * p.features + feature, down < p.width ? p.features - feature : 0,
                      false);
      }
    }
  }

  __device__ void store(const Expansion& p, int64_t first_row, int64_t first_feature, int64_t first_k, Lines& in_tile,
                        Lines& factor_tile) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t row = first_row + line_of(i), k = first_k + k_of(i);
      const bool inside = k < p.width;
      if constexpr (kActivate) {
        C values[kNeighbours], shift[kNeighbours] = {};
        if (p.shift) load_elements(shift, static_cast<const G*>(p.shift) + k, p.width - k, p.by_vectors);
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) values[j] = in_[i][j] + shift[j];
        if (p.kept && first_feature == 0 && row < p.rows) {
          store_elements(static_cast<C*>(p.kept) + row * p.width + k, values, p.width - k, p.by_vectors);
        }
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) {
          C derivative;
          in_tile[line_of(i)][k_of(i) + j] = static_cast<G>(inside ? activate(p.kind, values[j], derivative) : C(0));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) in_tile[line_of(i)][k_of(i) + j] = inside ? in_[i][j] : G(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        if constexpr (kActivate) {
          factor_tile[line_of(i)][k_of(i) + j] = first_k + k_of(i) < p.width ? factor_[i][j] : G(0.0f);
        } else {
          factor_tile[feature_of(i) + j][across_of(i)] = first_k + across_of(i) < p.width ? factor_[i][j] : G(0.0f);
        }
      }
    }
  }

 private:
  using C = Acc<G>;
  using In = std::conditional_t<kActivate, C, G>;
  static constexpr int kAcross = kDepth<G> / kNeighbours;
  static constexpr int kPieces = kTile * kAcross / kThreads;

  // Where piece i is: k runs fastest, or the features of a factor whose features are neighbours.
  __device__ static int piece_of(int i) { return static_cast<int>(threadIdx.x) + i * kThreads; }
  __device__ static int line_of(int i) { return piece_of(i) / kAcross; }
  __device__ static int k_of(int i) { return piece_of(i) % kAcross * kNeighbours; }
  __device__ static int across_of(int i) { return piece_of(i) / kFeaturePieces; }
  __device__ static int feature_of(int i) { return piece_of(i) % kFeaturePieces * kNeighbours; }

  In in_[kPieces][kNeighbours];
  G factor_[kPieces][kNeighbours];
};

// What kCount neighbouring elements of y take of x and the bias.
template <class T, class G, int kCount>
struct End {
  T x[kCount] = {};
  G bias[kCount] = {};

  __device__ void load(const Expansion& p, int64_t row, int64_t feature) {
    const int64_t left = row < p.rows ? p.features - feature : 0;
    if (p.x) load_elements(x, static_cast<const T*>(p.x) + row * p.x_stride + feature, left, p.aligned);
    if (p.bias) load_elements(bias, static_cast<const G*>(p.bias) + feature, left, p.bias_aligned);
  }

  // y = x + s (branch + bias).
  __device__ void finish(const Expansion& p, int64_t row, int64_t feature, const Acc<T> (&branch)[kCount]) const {
    using C = Acc<T>;
    if (row >= p.rows || feature >= p.features) return;
    C values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<C>(x[i]) + static_cast<C>(p.scaling) * (branch[i] + static_cast<C>(bias[i]));
    }
    store_elements(static_cast<T*>(p.y) + row * p.features + feature, values, p.features - feature, p.aligned);
  }
};

// y = x + s (act(in + shift) factor^T + bias), for 64 x 64 elements a block; without kActivate, in is taken as it is.
template <class T, class G, bool kActivate>
__global__ void __launch_bounds__(kThreads) expand_rows(const __grid_constant__ Expansion p) {
  using C = Acc<T>;
  constexpr bool kTensorCores = sizeof(G) == 2;
  constexpr int kPitch = Step<G, kActivate>::kPitch;
  __shared__ __align__(32) G in_tile[kTile][kPitch];
  __shared__ __align__(32) G factor_tile[kTile][kPitch];
  const int64_t tiles = (p.features + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / tiles * kTile, first_feature = blockIdx.x % tiles * kTile;
  Step<G, kActivate> step;
  step.load(p, first_row, first_feature, 0);
  const auto next_step = [&](int64_t k) {
    __syncthreads();  // The tiles of the step before were read.
    step.store(p, first_row, first_feature, k, in_tile, factor_tile);
    __syncthreads();
    if (k + kDepth<G> < p.width) step.load(p, first_row, first_feature, k + kDepth<G>);
  };
  if constexpr (kTensorCores) {
    // A warp takes two of the sixteen products of 16 x 16 elements.
    namespace wmma = nvcuda::wmma;
    using Element = typename TensorCoreOf<G>::type;
    constexpr int kFragments = 2, kResultPitch = kTile + 4, kEnds = kTile * kTile / kThreads / kNeighbours;
    __shared__ __align__(32) float result[kTile][kResultPitch];
    const int warp = threadIdx.x / kWarp, row = warp / 2 * kStep, column = warp % 2 * kFragments * kStep;
    wmma::fragment<wmma::accumulator, kStep, kStep, kStep, float> sums[kFragments];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) wmma::fill_fragment(sums[i], 0.0f);
    End<T, G, kNeighbours> ends[kEnds];
    const auto place_of = [](int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) * kNeighbours; };
    const auto row_of = [&](int i) { return first_row + place_of(i) / kTile; };
    const auto feature_of = [&](int i) { return first_feature + place_of(i) % kTile; };
    if (p.aligned && p.bias_aligned && p.features % kNeighbours == 0) {
      // As in Step: the last place within for one beyond.
      const auto feature_within = [&](int i) { return min(feature_of(i), p.features - kNeighbours); };
      const T* x = static_cast<const T*>(p.x);
      if (x) {
#pragma unroll
        for (int i = 0; i < kEnds; ++i) {
          load_whole(ends[i].x, x + min(row_of(i), p.rows - 1) * p.x_stride + feature_within(i));
        }
      }
      if (p.bias) {
#pragma unroll
        for (int i = 0; i < kEnds; ++i) load_whole(ends[i].bias, static_cast<const G*>(p.bias) + feature_within(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEnds; ++i) ends[i].load(p, row_of(i), feature_of(i));
    }
    for (int64_t k = 0; k < p.width; k += kDepth<G>) {
      next_step(k);
#pragma unroll
      for (int depth = 0; depth < kDepth<G>; depth += kStep) {
        wmma::fragment<wmma::matrix_a, kStep, kStep, kStep, Element, wmma::row_major> a;
        wmma::load_matrix_sync(a, reinterpret_cast<const Element*>(&in_tile[row][depth]), kPitch);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          wmma::fragment<wmma::matrix_b, kStep, kStep, kStep, Element, wmma::col_major> b;
          wmma::load_matrix_sync(b, reinterpret_cast<const Element*>(&factor_tile[column + i * kStep][depth]), kPitch);
          wmma::mma_sync(sums[i], a, b, sums[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      wmma::store_matrix_sync(&result[row][column + i * kStep], sums[i], kResultPitch, wmma::mem_row_major);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEnds; ++i) {
      float branch[kNeighbours];
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) branch[j] = result[place_of(i) / kTile][place_of(i) % kTile + j];
      ends[i].finish(p, row_of(i), feature_of(i), branch);
    }
  } else {
    // A thread takes four neighbouring rows and four columns 16 apart, whose lines lie in different banks.
    constexpr int kEach = 4, kLanes = kTile / kEach;
    const int row = threadIdx.x / kLanes * kEach, column = threadIdx.x % kLanes;
    C sums[kEach][kEach][1] = {};
    for (int64_t k = 0; k < p.width; k += kDepth<G>) {
      next_step(k);
#pragma unroll 8
      for (int depth = 0; depth < kDepth<G>; ++depth) {
        C a[kEach], b[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          a[i] = in_tile[row + i][depth];
          b[i] = factor_tile[column + i * kLanes][depth];
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) sums[i][j][0] += a[i] * b[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t y_row = first_row + row + i, feature = first_feature + column + j * kLanes;
        End<T, G, 1> end;
        end.load(p, y_row, feature);
        end.finish(p, y_row, feature, sums[i][j]);
      }
    }
  }
}

constexpr int kWarps = 8, kVector = 4;

struct PostNorm {
  const void* branch;  // [rows, features] of the accumulation type, contiguous.
  const void* bias;    // Of the accumulation type; null for none.
  const void* x;       // Null without a residual.
  int64_t x_stride;
  void* y;
  int64_t rows, features;
  double scaling, eps;
  const void *norm_weight, *norm_bias;  // Of the accumulation type.
  bool aligned;
};

// y = x + LN(s (branch + bias)).
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) finish_rows(const __grid_constant__ PostNorm p) {
  using C = Acc<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const C* branch = static_cast<const C*>(p.branch) + row * p.features;
  const C *bias = static_cast<const C*>(p.bias), *weight = static_cast<const C*>(p.norm_weight),
          *shift = static_cast<const C*>(p.norm_bias);
  const auto scaled = [&](int64_t k) { return static_cast<C>(p.scaling) * (bias ? branch[k] + bias[k] : branch[k]); };
  C sum = 0, squares = 0;
  for (int64_t k = lane; k < p.features; k += kWarp) sum += scaled(k);
  const C mean = warp_sum(sum) / static_cast<C>(p.features);
  for (int64_t k = lane; k < p.features; k += kWarp) squares += (scaled(k) - mean) * (scaled(k) - mean);
  const C inverse = rsqrt(warp_sum(squares) / static_cast<C>(p.features) + static_cast<C>(p.eps));
  for (int64_t k = lane * kVector; k < p.features; k += kWarp * kVector) {
    C values[kVector] = {};
    if (p.x) {
      load_elements(values, static_cast<const T*>(p.x) + row * p.x_stride + k, p.features - k, p.aligned);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (k + i >= p.features) continue;
      values[i] += (scaled(k + i) - mean) * inverse * weight[k + i] + shift[k + i];
    }
    store_elements(static_cast<T*>(p.y) + row * p.features + k, values, p.features - k, p.aligned);
  }
}

// The adapter, and x, as the products take them.
struct Adapter {
  Adapter(const at::Tensor& rows, const BottleneckTensors& tensors, c10::string_view norm_place, double eps)
      : acc(acc_type(rows.scalar_type())),
        pre(norm_place == "pre"),
        post(norm_place == "post"),
        type(!pre && tensors.down_weight.scalar_type() == rows.scalar_type() ? rows.scalar_type() : acc),
        down(as_type(tensors.down_weight, type).contiguous()),
        up(as_type(tensors.up_weight, type).contiguous()),
        down_bias(undefined_or(tensors.down_bias, type)),
        up_bias(undefined_or(tensors.up_bias, type)),
        norm_weight(undefined_or(tensors.norm_weight, acc)),
        norm_bias(undefined_or(tensors.norm_bias, acc)) {
    if (!pre) {
      input = as_type(rows, type);
      return;
    }
    wide = as_type(rows, acc);
    std::tie(input, mean, inverse) = at::native_layer_norm(wide, {rows.size(1)}, norm_weight, norm_bias, eps);
  }

  at::ScalarType acc;  // Of the sums.
  bool pre, post;
  at::ScalarType type;  // Of the products' inputs: rounding what a pre-norm gives would show in steep activations.
  at::Tensor down, up, down_bias, up_bias, norm_weight, norm_bias;
  at::Tensor input;                // n
  at::Tensor wide, mean, inverse;  // Of a pre-norm.
};

unsigned element_blocks(int64_t count) {
  return grid_size(blocks_for(count, kThreads), 1 << 16);
}

enum class Activated { kNo, kYes };

// Launches expand_rows; `x` is undefined without a residual.
void expand(Expansion& p, const at::Tensor& in, const at::Tensor& factor, const at::Tensor& x, const at::Tensor& y,
            Activated activated) {
  const auto begins_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; };
  p.in = in.const_data_ptr();
  p.width = in.size(1);
  p.factor = factor.const_data_ptr();
  p.x = x.defined() ? x.const_data_ptr() : nullptr;
  p.x_stride = x.defined() ? x.stride(0) : 0;
  p.y = y.data_ptr();
  p.rows = y.size(0);
  p.features = y.size(1);
  p.by_vectors = p.width % kNeighbours == 0 && p.features % kNeighbours == 0 && is_aligned(in, p.width, kNeighbours) &&
                 is_aligned(factor, factor.size(1), kNeighbours) && begins_aligned(p.kept) && begins_aligned(p.shift);
  p.bias_aligned = begins_aligned(p.bias);
  p.aligned = is_aligned(y, p.features, kNeighbours) && (!x.defined() || is_aligned(x, p.x_stride, kNeighbours));
  if (y.numel() == 0) return;
  const int64_t blocks = blocks_for(p.rows, kTile) * blocks_for(p.features, kTile);
  dispatch_pair(y.scalar_type(), factor.scalar_type(), [&](auto t, auto g) {
    using T = decltype(t);
    using G = decltype(g);
    const auto kernel = activated == Activated::kYes ? expand_rows<T, G, true> : expand_rows<T, G, false>;
    launch(kernel, dim3(grid_size(blocks)), dim3(kThreads), 0, p);
  });
}

std::tuple<at::Tensor, at::Tensor> bottleneck_adapter(const at::Tensor& x, const at::Tensor& down_weight,
                                                      const OptionalTensor& down_bias, const at::Tensor& up_weight,
                                                      const OptionalTensor& up_bias, const OptionalTensor& norm_weight,
                                                      const OptionalTensor& norm_bias, c10::string_view activation,
                                                      c10::string_view norm, bool residual, double scaling, double eps,
                                                      bool keep_hidden) {
  const BottleneckTensors tensors{down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias};
  check_bottleneck(x, tensors, activation, norm, scaling, eps);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor rows = as_rows(x), y = at::empty(rows.sizes(), rows.options());
  const int64_t m = rows.size(0), features = rows.size(1), width = down_weight.size(0);
  const auto options = x.options().dtype(acc_type(x.scalar_type()));
  if (m == 0) {
    const at::Tensor none = at::empty({m, width}, options);
    return {with_leading_sizes(y, x), keep_hidden ? with_leading_sizes(none, x) : at::empty({0}, options)};
  }
  const Adapter adapter(rows, tensors, norm, eps);
  const at::Tensor hidden = mm_wide(adapter.input, adapter.down.t());
  if (!adapter.post) {
    const at::Tensor kept = keep_hidden && adapter.down_bias.defined() ? at::empty_like(hidden) : hidden;
    Expansion p{};
    p.shift = data_or_null(adapter.down_bias);
    p.kept = kept.is_same(hidden) ? nullptr : kept.data_ptr();
    p.bias = data_or_null(adapter.up_bias);
    p.scaling = scaling;
    p.kind = activation_of(activation);
    expand(p, hidden, adapter.up, residual ? rows : at::Tensor(), y, Activated::kYes);
    return {with_leading_sizes(y, x), keep_hidden ? with_leading_sizes(kept, x) : at::empty({0}, options)};
  }
  const at::Tensor shift = undefined_or(down_bias, adapter.acc), up_bias_of_sums = undefined_or(up_bias, adapter.acc);
  const at::Tensor activated = at::empty(hidden.sizes(), adapter.input.options());
  dispatch_storage(adapter.type, [&](auto g) {
    using G = decltype(g);
    using C = Acc<G>;
    launch(add_bias_activate<C, G>, dim3(element_blocks(hidden.numel())), dim3(kThreads), 0, hidden.data_ptr<C>(),
           static_cast<const C*>(data_or_null(shift)), activated.data_ptr<G>(), hidden.numel(), width,
           activation_of(activation));
  });
  const at::Tensor branch = mm_wide(activated, adapter.up.t());
  PostNorm end{branch.const_data_ptr(), data_or_null(up_bias_of_sums)};
  end.x = residual ? rows.const_data_ptr() : nullptr;
  end.x_stride = rows.stride(0);
  end.y = y.data_ptr();
  end.rows = m;
  end.features = features;
  end.scaling = scaling;
  end.eps = eps;
  end.norm_weight = adapter.norm_weight.const_data_ptr();
  end.norm_bias = adapter.norm_bias.const_data_ptr();
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
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [needs_x, needs_down, needs_down_bias, needs_up, needs_up_bias, needs_norm, needs_norm_bias] = needs;
  if (x.numel() == 0) {
    const int64_t features = down_weight.size(1), width = down_weight.size(0);
    const std::vector<int64_t> sizes[] = {x.sizes().vec(), {width, features}, {width},   {features, width},
                                          {features},      {features},        {features}};
    std::vector<at::Tensor> zeros;
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) zeros.push_back(at::zeros(sizes[i], (i == 0 ? x : down_weight).options()));
    }
    return zeros;
  }
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const Adapter adapter(rows, tensors, norm, eps);
  const int64_t features = rows.size(1), width = down_weight.size(0);
  const at::Tensor kept = hidden.contiguous().view({rows.size(0), width});
  const at::Tensor grad_hidden = at::empty(kept.sizes(), adapter.input.options()),
                   activated = at::empty_like(grad_hidden);
  at::Tensor grad_branch = as_type(grad_rows, adapter.type), grad_norm, grad_norm_bias;
  const auto through_activation = [&](const at::Tensor& grad_activated, double scale) {
    dispatch_storage(adapter.type, [&](auto g) {
      using G = decltype(g);
      using C = Acc<G>;
      launch(activate_backward<C, G>, dim3(element_blocks(kept.numel())), dim3(kThreads), 0,
             grad_activated.const_data_ptr<C>(), kept.const_data_ptr<C>(), grad_hidden.data_ptr<G>(),
             activated.data_ptr<G>(), kept.numel(), static_cast<C>(scale), activation_of(activation));
    });
  };
  if (adapter.post) {
    through_activation(kept, scaling);  // For `activated`; the gradient follows.
    at::Tensor branch = mm_wide(activated, adapter.up.t());
    if (adapter.up_bias.defined()) branch.add_(adapter.up_bias, scaling);
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
    grad_x = at::empty(rows.sizes(), rows.options());
    Expansion p{};
    p.scaling = 1.0;
    expand(p, grad_hidden, adapter.down, residual ? grad_rows : at::Tensor(), grad_x, Activated::kNo);
  }

  // Of the parameters' type; a half precision is summed in float32 and rounded once also by mm and sum.
  const at::ScalarType type = down_weight.scalar_type();
  const auto product = [&](const at::Tensor& a, const at::Tensor& b) { return as_type(at::mm(a, b), type); };
  const auto sum = [&](const at::Tensor& grad) { return as_type(grad.sum(0), type); };
  std::vector<at::Tensor> grads;
  if (needs_x) grads.push_back(with_leading_sizes(as_type(grad_x, x.scalar_type()), x));
  if (needs_down) grads.push_back(product(grad_hidden.t(), adapter.input));
  if (needs_down_bias) grads.push_back(sum(grad_hidden));
  if (needs_up) grads.push_back(product(grad_branch.t(), activated));
  if (needs_up_bias) {
    grads.push_back(scaling == 1.0 ? sum(grad_branch)
                                   : as_type(grad_branch.sum(0, false, adapter.acc).mul_(scaling), type));
  }
  if (needs_norm) grads.push_back(as_type(grad_norm, type));
  if (needs_norm_bias) grads.push_back(as_type(grad_norm_bias, type));
  return grads;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("bottleneck_adapter", bottleneck_adapter);
  m.impl("bottleneck_adapter_backward", bottleneck_adapter_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
