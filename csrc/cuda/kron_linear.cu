// kron_linear on the device: y = x H (+ bias), H = scaling sum_i A_i (x) B_i, by steps, or by H itself:
//
//   z[m,p,i,c] = sum_u x[m,p,u] S_i[u,c]                 or x[m,p,c], the same for all i
//   w[m,q,i,c] = scaling sum_p A_i[p,q] z[m,p,i,c]
//   y[m,q,v]   = sum_(i,c) w[m,q,i,c] T_i[c,v] + bias    or sum_i w[m,q,i,v] + bias
//
// By factors, S and T are s and t; B first, S is B and there is no T; A first, T is B and there is no S. The products
// with S and T are GEMMs of at:: over all (m, p) or (m, q). The bias is a row of T for each q, picked by a column of w
// that holds a 1, so that it costs no pass over y. Where H is cheaper, a kernel writes it, once, as the GEMM reads it.
//
// Shapes   x [m, a_in, b_in], y [m, a_out, b_out], A [n, a_in, a_out], B [n, b_in, b_out], s [n, b_in, rank],
//          t [n, rank, b_out]; H [a_in b_in, a_out b_out].
// Types    GEMMs take half-precision factors of x's type as they are, else everything in the accumulation type
//          (float32; float64 for a float64 x), in which they sum. z and the sums of the kernels are of that type.
// Kernels  mix_terms    a thread a few q and neighbouring columns of w, or of the gradient of z by A's transpose
//          sum_of_outer  a block a chunk of rows for 16 x 16 elements of one A_i's gradient; sum_chunks adds in order
//          form_product  a thread eight neighbouring columns of H
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/kron_checks.h"
#include "common/kron_orders.h"
#include "common/tensors.h"
#include "cuda/gemm.h"
#include "cuda/vectors.h"

namespace peft_ext::cuda {
namespace {

using kron::collect;
using kron::empty_grads;
using kron::Grads;
using kron::Needs;
using kron::OptionalTensor;
using kron::Order;
using kron::Sizes;

constexpr int kThreads = 256;

// --- w = A z ---

struct Mix {
  const void* in;  // in[row, k, term, c], neighbours in c.
  int64_t in_row, in_k, in_term;
  const void* A;  // A[term, k, l], of the accumulation type.
  int64_t A_term, A_k, A_l;
  const void* bias;  // [ls, width] of the accumulation type; null for none.
  void* out;         // out[row, l, term, c], neighbours in (term, c), then `ones` columns of which number l is 1.
  int64_t out_row, out_l;
  int64_t rows, ks, ls, width;
  int64_t out_terms, sum_terms;  // One of them is 1: each term has its columns of out, or all are summed.
  int64_t ones;
  double scaling;
  bool in_aligned, out_aligned;
};

constexpr int kMixed = 4;

// out[row, l, i, c] = scaling sum_k A[i, k, l] in[row, k, i, c], or the sum of that over i, + bias.
template <class In, class Out, int kColumns>
__global__ void __launch_bounds__(kThreads) mix_terms(const __grid_constant__ Mix p) {
  using C = Acc<In>;
  const int64_t groups = p.out_terms * p.width / kColumns, chunks = (p.ls + kMixed - 1) / kMixed;
  const int64_t count = p.rows * chunks * groups;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = index % groups * kColumns, first = index / groups % chunks * kMixed;
    const int64_t row = index / groups / chunks, term = column / p.width, c = column % p.width;
    const In* in = static_cast<const In*>(p.in) + row * p.in_row + term * p.in_term + c;
    const C* A = static_cast<const C*>(p.A) + term * p.A_term;
    C sums[kMixed][kColumns] = {};
    for (int64_t i = 0; i < p.sum_terms; ++i) {
      for (int64_t k = 0; k < p.ks; ++k) {
        C values[kColumns];
        load_elements(values, in + i * p.in_term + k * p.in_k, kColumns, p.in_aligned);
#pragma unroll
        for (int l = 0; l < kMixed; ++l) {
          const C a = A[i * p.A_term + k * p.A_k + min(first + l, p.ls - 1) * p.A_l];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[l][j] += a * values[j];
        }
      }
    }
    Out* out = static_cast<Out*>(p.out) + row * p.out_row;
#pragma unroll
    for (int l = 0; l < kMixed; ++l) {
      if (first + l >= p.ls) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sums[l][j] *= static_cast<C>(p.scaling);
        if (p.bias) sums[l][j] += static_cast<const C*>(p.bias)[(first + l) * p.width + c + j];
      }
      store_elements(out + (first + l) * p.out_l + column, sums[l], kColumns, p.out_aligned);
      if (column > 0) continue;
      Out* ones = out + (first + l) * p.out_l + p.out_terms * p.width;
      for (int64_t j = 0; j < p.ones; ++j) ones[j] = static_cast<Out>(j == first + l ? 1.0f : 0.0f);
    }
  }
}

// --- the gradient of A ---

struct Outer {
  const void* left;  // left[row, k, term, c]
  int64_t left_row, left_k, left_term;
  const void* right;  // right[row, l, term, c]
  int64_t right_row, right_l, right_term;
  void* partial;  // [chunks, terms, ks, ls] of the accumulation type.
  int64_t rows, chunks, terms, ks, ls, width;
};

constexpr int kOuterTile = 16, kOuterDepth = 32;
static_assert(kOuterTile * kOuterTile == kThreads);

// partial[chunk, i, k, l] = sum over the chunk's rows and c of left[row, k, i, c] right[row, l, i, c].
template <class Left, class Right>
__global__ void __launch_bounds__(kThreads) sum_of_outer(const __grid_constant__ Outer p) {
  using C = Acc<Left>;
  __shared__ C left_tile[kOuterTile][kOuterDepth + 1];
  __shared__ C right_tile[kOuterTile][kOuterDepth + 1];
  const int64_t k_tiles = (p.ks + kOuterTile - 1) / kOuterTile, l_tiles = (p.ls + kOuterTile - 1) / kOuterTile;
  int64_t block = blockIdx.x;
  const int64_t first_l = block % l_tiles * kOuterTile;
  block /= l_tiles;
  const int64_t first_k = block % k_tiles * kOuterTile;
  block /= k_tiles;
  const int64_t term = block % p.terms, chunk = block / p.terms;
  const int64_t first_row = chunk * p.rows / p.chunks;
  const int64_t depth = ((chunk + 1) * p.rows / p.chunks - first_row) * p.width;
  const Left* left = static_cast<const Left*>(p.left) + first_row * p.left_row + term * p.left_term;
  const Right* right = static_cast<const Right*>(p.right) + first_row * p.right_row + term * p.right_term;
  const int k = threadIdx.x / kOuterTile, l = threadIdx.x % kOuterTile;
  C sum = 0;
  for (int64_t start = 0; start < depth; start += kOuterDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kOuterTile * kOuterDepth; i += kThreads) {
      const int line = i / kOuterDepth, offset = i % kOuterDepth;
      const int64_t row = (start + offset) / p.width, c = (start + offset) % p.width;
      const bool inside = start + offset < depth;
      left_tile[line][offset] = inside && first_k + line < p.ks
                                    ? static_cast<C>(left[row * p.left_row + (first_k + line) * p.left_k + c])
                                    : C(0);
      right_tile[line][offset] = inside && first_l + line < p.ls
                                     ? static_cast<C>(right[row * p.right_row + (first_l + line) * p.right_l + c])
                                     : C(0);
    }
    __syncthreads();
#pragma unroll
    for (int offset = 0; offset < kOuterDepth; ++offset) sum += left_tile[k][offset] * right_tile[l][offset];
  }
  if (first_k + k >= p.ks || first_l + l >= p.ls) return;
  static_cast<C*>(p.partial)[((chunk * p.terms + term) * p.ks + first_k + k) * p.ls + first_l + l] = sum;
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    sum_chunks(const C* partial, C* total, int64_t count, int64_t chunks, C scaling) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  C sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
  total[i] = scaling * sum;
}

// --- H ---

struct Product {
  const void *A, *B, *t;  // Contiguous, of the type of H; t null: B is dense.
  void* H;
  int64_t n, a_in, a_out, b_in, b_out, rank;
  double scaling;
  bool aligned;
};

constexpr int kVector = 8;

template <class G>
__global__ void __launch_bounds__(kThreads) form_product(const __grid_constant__ Product p) {
  using C = Acc<G>;
  const G *A = static_cast<const G*>(p.A), *B = static_cast<const G*>(p.B), *t = static_cast<const G*>(p.t);
  const int64_t groups = (p.b_out + kVector - 1) / kVector, count = p.a_in * p.b_in * p.a_out * groups;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = index % groups * kVector, l = index / groups % p.a_out, row = index / groups / p.a_out;
    const int64_t k = row / p.b_in, u = row % p.b_in, left = p.b_out - column;
    C sums[kVector] = {};
    for (int64_t i = 0; i < p.n; ++i) {
      const C a = static_cast<C>(p.scaling) * static_cast<C>(A[(i * p.a_in + k) * p.a_out + l]);
      C values[kVector] = {};
      if (t == nullptr) {
        load_elements(values, B + (i * p.b_in + u) * p.b_out + column, left, p.aligned);
      } else {
        for (int64_t r = 0; r < p.rank; ++r) {
          const C s = static_cast<C>(B[(i * p.b_in + u) * p.rank + r]);
          C terms[kVector];
          load_elements(terms, t + (i * p.rank + r) * p.b_out + column, left, p.aligned);
#pragma unroll
          for (int j = 0; j < kVector; ++j) values[j] += s * terms[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += a * values[j];
    }
    store_elements(static_cast<G*>(p.H) + (row * p.a_out + l) * p.b_out + column, sums, left, p.aligned);
  }
}

unsigned blocks_of(int64_t threads) {
  return grid_size(blocks_for(threads, kThreads), 1 << 16);
}

// Calls work(In{}, Out{}), each T or the accumulation type of T.
template <class Work>
void dispatch_types(at::ScalarType x_type, at::ScalarType in, at::ScalarType out, const Work& work) {
  dispatch_pair(x_type, in, [&](auto t, auto first) {
    using T = decltype(t);
    if (out == x_type) return work(first, T{});
    work(first, Acc<T>{});
  });
}

// --- the steps ---

constexpr int64_t kInlineRank = 4;  // Up to which form_product multiplies s and t itself.

// Microseconds of a pass over m rows: launches, bytes and multiply-adds at the rates of an H100, all of them rough.
class Costs {
 public:
  Costs(const Sizes& sizes, int64_t m, at::ScalarType type)
      : s_(sizes),
        m_(static_cast<double>(m)),
        element_(static_cast<double>(c10::elementSize(type))),
        gemm_(type == acc_type(type) ? 1.5e7 : 1.5e8) {}

  // With inner steps of `width` columns a term.
  double steps(int64_t width, bool has_S, bool has_T) const {
    const double inner = static_cast<double>(s_.n * width);
    double launches = 1 + 2 * has_S + 2 * has_T;
    double bytes = 0, adds = 0;  // Beyond those of x and y.
    if (has_S) bytes += m_ * static_cast<double>(s_.a_in) * inner * 2 * kSumBytes;
    if (has_T) bytes += m_ * static_cast<double>(s_.a_out) * inner * 2 * element_;
    if (has_S) adds += m_ * static_cast<double>(s_.in()) * inner;
    if (has_T) adds += m_ * static_cast<double>(s_.out()) * inner;
    if (s_.rank > 0 && width != s_.rank) launches += 2;
    const double mixed = m_ * static_cast<double>(s_.a_in * s_.a_out) * inner;
    return launches * kLaunch + bytes / kBytes + adds / gemm_ + mixed / kMix;
  }

  double product() const {
    const double elements = static_cast<double>(s_.in()) * static_cast<double>(s_.out());
    const int64_t factors = s_.rank <= kInlineRank ? s_.rank : 0;
    const double formed = elements * static_cast<double>(s_.n * (1 + factors));
    const double launches = s_.rank > kInlineRank ? 4 : 2;
    return launches * kLaunch + elements * 2 * element_ / kBytes + formed / kForm + m_ * elements / gemm_;
  }

 private:
  static constexpr double kLaunch = 3.0, kBytes = 2e6, kMix = 5e6, kForm = 1e7, kSumBytes = 4.0;
  const Sizes& s_;
  const double m_, element_, gemm_;
};

Order choose_order(const Sizes& s, int64_t m, at::ScalarType type) {
  const Costs costs(s, m, type);
  const double b_first = costs.steps(s.b_out, true, false), a_first = costs.steps(s.b_in, false, true);
  const double product = costs.product(), best = std::min({b_first, a_first, product});
  if (s.rank > 0 && costs.steps(s.rank, true, true) <= best) return Order::kFactors;
  if (product == best) return Order::kProduct;
  return b_first == best ? Order::kBFirst : Order::kAFirst;
}

// What the GEMMs take.
at::ScalarType product_type(const at::Tensor& x, const at::Tensor& A) {
  return A.scalar_type() == x.scalar_type() ? x.scalar_type() : acc_type(x.scalar_type());
}

// S and T of the header, if there, and A; `width` columns to a term between them.
struct Steps {
  Steps(const Sizes& sizes, Order order, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
        double scaling, at::ScalarType type)
      : sizes(sizes), A(as_type(A, acc_type(type)).contiguous()), scaling(scaling), type(type) {
    if (order != Order::kAFirst) S = as_type(B.permute({1, 0, 2}).reshape({sizes.b_in, -1}), type);
    if (order == Order::kFactors) T = as_type(*t, type).reshape({-1, sizes.b_out});
    if (order == Order::kAFirst) T = as_type(B, type).reshape({-1, sizes.b_out});
    width = S.defined() ? S.size(1) / sizes.n : T.size(0) / sizes.n;
  }

  const Sizes sizes;
  at::Tensor A, S, T;
  double scaling;
  at::ScalarType type;
  int64_t width;

  int64_t inner() const { return sizes.n * width; }

  at::Tensor x_rows(const at::Tensor& x) const {
    return as_type(x, type).reshape({x.size(0) * sizes.a_in, sizes.b_in});
  }
  at::Tensor y_rows(const at::Tensor& y) const {
    return as_type(y, type).reshape({y.size(0) * sizes.a_out, sizes.b_out});
  }

  // z of x, and the gradient of w of that of y: [m a, n width], or [m, a width] as it is.
  at::Tensor before(const at::Tensor& x) const { return S.defined() ? mm_wide(x_rows(x), S) : x; }
  at::Tensor after(const at::Tensor& y) const { return T.defined() ? mm_wide(y_rows(y), T.t()) : y; }
};

enum class Direction { kForward, kBackward };

// From z to w, or from the gradient of w to that of z. Beside a product with S or T, each term has columns of its own;
// else all terms share those of x or y.
void mix(const Steps& steps, Direction direction, const at::Tensor& in, const at::Tensor& out, int64_t rows,
         int64_t ones, const at::Tensor& bias, at::ScalarType x_type) {
  const bool forward = direction == Direction::kForward;
  const Sizes& s = steps.sizes;
  const bool in_own = forward ? steps.S.defined() : steps.T.defined();
  const bool out_own = forward ? steps.T.defined() : steps.S.defined();
  Mix p{};
  p.in = in.const_data_ptr();
  p.in_k = in_own ? steps.inner() : steps.width;
  p.in_term = in_own ? steps.width : 0;
  p.in_row = in_own ? p.in_k * (forward ? s.a_in : s.a_out) : in.stride(0);
  p.A = steps.A.const_data_ptr();
  p.A_term = s.a_in * s.a_out;
  p.A_k = forward ? s.a_out : 1;
  p.A_l = forward ? 1 : s.a_out;
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.rows = rows;
  p.ks = forward ? s.a_in : s.a_out;
  p.ls = forward ? s.a_out : s.a_in;
  p.width = steps.width;
  p.out_terms = out_own ? s.n : 1;
  p.sum_terms = out_own ? 1 : s.n;
  p.ones = ones;
  p.out = out.data_ptr();
  p.out_l = p.out_terms * p.width + ones;
  p.out_row = p.ls * p.out_l;
  p.scaling = steps.scaling;
  constexpr int kColumns = 4;
  p.in_aligned = is_aligned(in, p.in_row, kColumns) && p.in_k % kColumns == 0 && p.in_term % kColumns == 0;
  p.out_aligned = is_aligned(out, p.out_l, kColumns);
  const int64_t threads = rows * blocks_for(p.ls, kMixed) * p.out_terms * p.width;
  dispatch_types(x_type, in.scalar_type(), out.scalar_type(), [&](auto first, auto second) {
    using In = decltype(first);
    using Out = decltype(second);
    if (p.width % kColumns == 0) {
      launch(mix_terms<In, Out, kColumns>, dim3(blocks_of(threads / kColumns)), dim3(kThreads), 0, p);
    } else {
      launch(mix_terms<In, Out, 1>, dim3(blocks_of(threads)), dim3(kThreads), 0, p);
    }
  });
}

// The gradient of A, of the accumulation type, from z and the gradient of w.
at::Tensor grad_of_A(const Steps& steps, const at::Tensor& z, const at::Tensor& grad_w, int64_t rows,
                     at::ScalarType x_type) {
  constexpr int64_t kDepth = 512, kMost = 64;
  const Sizes& s = steps.sizes;
  Outer p{};
  const bool left_own = steps.S.defined(), right_own = steps.T.defined();
  p.left = z.const_data_ptr();
  p.left_k = left_own ? steps.inner() : steps.width;
  p.left_term = left_own ? steps.width : 0;
  p.left_row = left_own ? p.left_k * s.a_in : z.stride(0);
  p.right = grad_w.const_data_ptr();
  p.right_l = right_own ? steps.inner() : steps.width;
  p.right_term = right_own ? steps.width : 0;
  p.right_row = right_own ? p.right_l * s.a_out : grad_w.stride(0);
  p.rows = rows;
  p.chunks = std::clamp<int64_t>(rows * steps.width / kDepth, 1, std::min(kMost, rows));
  p.terms = s.n;
  p.ks = s.a_in;
  p.ls = s.a_out;
  p.width = steps.width;
  const at::Tensor partial = at::empty({p.chunks, s.n, s.a_in, s.a_out}, steps.A.options());
  const at::Tensor total = at::empty({s.n, s.a_in, s.a_out}, steps.A.options());
  p.partial = partial.data_ptr();
  const int64_t blocks = p.chunks * s.n * blocks_for(s.a_in, kOuterTile) * blocks_for(s.a_out, kOuterTile);
  dispatch_types(x_type, z.scalar_type(), grad_w.scalar_type(), [&](auto first, auto second) {
    launch(sum_of_outer<decltype(first), decltype(second)>, dim3(grid_size(blocks)), dim3(kThreads), 0, p);
  });
  dispatch_storage(steps.A.scalar_type(), [&](auto c) {
    using C = Acc<decltype(c)>;
    launch(sum_chunks<C>, dim3(grid_size(blocks_for(total.numel(), kThreads))), dim3(kThreads), 0,
           static_cast<const C*>(partial.const_data_ptr()), static_cast<C*>(total.data_ptr()), total.numel(), p.chunks,
           static_cast<C>(steps.scaling));
  });
  return total;
}

at::Tensor forward_steps(const Steps& steps, const at::Tensor& x, const OptionalTensor& bias) {
  const Sizes& s = steps.sizes;
  const int64_t m = x.size(0);
  const at::Tensor z = steps.before(x);
  if (!steps.T.defined()) {
    const at::Tensor y = at::empty({m, s.out()}, x.options());
    const at::Tensor row = bias ? as_type(*bias, steps.A.scalar_type()).contiguous() : at::Tensor();
    mix(steps, Direction::kForward, z, y, m, 0, row, x.scalar_type());
    return y;
  }
  const int64_t ones = bias ? s.a_out : 0;
  const at::Tensor w = at::empty({m * s.a_out, steps.inner() + ones}, x.options().dtype(steps.type));
  mix(steps, Direction::kForward, z, w, m, ones, at::Tensor(), x.scalar_type());
  const at::Tensor T = bias ? at::cat({steps.T, as_type(*bias, steps.type).reshape({s.a_out, s.b_out})}) : steps.T;
  return as_type(at::mm(w, T), x.scalar_type()).view({m, s.out()});
}

// Of B where S or T is that.
Grads backward_steps(const Steps& steps, const at::Tensor& grad_y, const at::Tensor& x, const Needs& needs) {
  const Sizes& s = steps.sizes;
  const auto [needs_x, needs_A, needs_B, needs_t, _] = needs;
  const bool needs_S = needs_B && steps.S.defined(), needs_T = steps.S.defined() ? needs_t : needs_B;
  const int64_t m = x.size(0);
  const at::ScalarType x_type = x.scalar_type();
  const auto options = x.options().dtype(steps.type);
  Grads grads;
  const at::Tensor z = needs_A || needs_T ? steps.before(x) : at::Tensor();
  if (needs_T) {
    const at::Tensor w = at::empty({m * s.a_out, steps.inner()}, options);
    mix(steps, Direction::kForward, z, w, m, 0, at::Tensor(), x_type);
    (steps.S.defined() ? grads.t : grads.B) = mm_wide(w.t(), steps.y_rows(grad_y)).view({s.n, steps.width, s.b_out});
  }
  if (!needs_x && !needs_A && !needs_S) return grads;
  const at::Tensor grad_w = steps.after(grad_y);
  if (needs_A) grads.A = grad_of_A(steps, z, grad_w, m, x_type);
  if (!needs_x && !needs_S) return grads;
  if (!steps.S.defined()) {
    grads.x = at::empty({m, s.in()}, x.options());
    mix(steps, Direction::kBackward, grad_w, grads.x, m, 0, at::Tensor(), x_type);
    return grads;
  }
  const at::Tensor grad_z = at::empty({m * s.a_in, steps.inner()}, options);
  mix(steps, Direction::kBackward, grad_w, grad_z, m, 0, at::Tensor(), x_type);
  if (needs_S) grads.B = mm_wide(steps.x_rows(x).t(), grad_z).view({s.b_in, s.n, steps.width}).transpose(0, 1);
  if (needs_x) grads.x = at::mm(grad_z, steps.S.t()).view({m, s.in()});
  return grads;
}

// --- by H ---

// Of `type`; with t, B is its left factor.
at::Tensor product(const Sizes& s, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t, double scaling,
                   at::ScalarType type) {
  const at::Tensor H = at::empty({s.in(), s.out()}, A.options().dtype(type));
  const at::Tensor a = as_type(A, type).contiguous(), b = as_type(B, type).contiguous();
  const at::Tensor right = t ? as_type(*t, type).contiguous() : at::Tensor();
  Product p{a.const_data_ptr(), b.const_data_ptr(), t ? right.const_data_ptr() : nullptr, H.data_ptr()};
  p.n = s.n;
  p.a_in = s.a_in;
  p.a_out = s.a_out;
  p.b_in = s.b_in;
  p.b_out = s.b_out;
  p.rank = t ? right.size(1) : 0;
  p.scaling = scaling;
  p.aligned = s.b_out % kVector == 0 && is_aligned(t ? right : b, s.b_out, kVector);
  const int64_t threads = s.in() * s.a_out * blocks_for(s.b_out, kVector);
  dispatch_storage(type,
                   [&](auto g) { launch(form_product<decltype(g)>, dim3(blocks_of(threads)), dim3(kThreads), 0, p); });
  return H;
}

Grads backward_product(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                       const at::Tensor& B, double scaling, at::ScalarType type, const Needs& needs) {
  const at::ScalarType acc = acc_type(type);
  const at::Tensor g = as_type(grad_y, type);
  Grads grads;
  if (needs[0]) grads.x = at::mm(g, product(s, A, B, std::nullopt, scaling, type).t());
  if (!needs[1] && !needs[2]) return grads;
  const at::Tensor grad_H = mm_wide(as_type(x, type).t(), g)
                                .view({s.a_in, s.b_in, s.a_out, s.b_out})
                                .transpose(1, 2)
                                .reshape({s.a_in * s.a_out, s.b_in * s.b_out});
  if (needs[1]) grads.A = at::mm(as_type(B, acc).reshape({s.n, -1}), grad_H.t()).view({s.n, s.a_in, s.a_out});
  if (needs[2]) grads.B = at::mm(as_type(A, acc).reshape({s.n, -1}), grad_H).view({s.n, s.b_in, s.b_out});
  if (scaling != 1.0) {
    if (needs[1]) grads.A.mul_(scaling);
    if (needs[2]) grads.B.mul_(scaling);
  }
  return grads;
}

// --- the op ---

// s t, of the accumulation type.
at::Tensor dense(const at::Tensor& s, const at::Tensor& t, at::ScalarType type) {
  return at::bmm(as_type(s, acc_type(type)), as_type(t, acc_type(type)));
}

at::Tensor forward(const Sizes& sizes, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                   const OptionalTensor& t, const OptionalTensor& bias, double scaling) {
  const at::ScalarType type = product_type(x, A);
  const Order order = choose_order(sizes, x.size(0), type);
  if (order == Order::kFactors) return forward_steps(Steps(sizes, order, A, B, t, scaling, type), x, bias);
  const bool inline_factors = t && order == Order::kProduct && sizes.rank <= kInlineRank;
  const at::Tensor right = t && !inline_factors ? dense(B, *t, type) : B;
  if (order != Order::kProduct) {
    return forward_steps(Steps(sizes, order, A, right, std::nullopt, scaling, type), x, bias);
  }
  const at::Tensor H = product(sizes, A, right, inline_factors ? t : std::nullopt, scaling, type);
  const at::Tensor rows = as_type(x, type);
  return as_type(bias ? at::addmm(as_type(*bias, type), rows, H) : at::mm(rows, H), x.scalar_type());
}

Grads backward(const Sizes& sizes, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
               const at::Tensor& B, const OptionalTensor& t, double scaling, Needs needs) {
  const at::ScalarType type = product_type(x, A);
  const Order order = choose_order(sizes, x.size(0), type);
  if (order == Order::kFactors) {
    return backward_steps(Steps(sizes, order, A, B, t, scaling, type), grad_y, x, needs);
  }
  const bool needs_s = needs[2], needs_t = needs[3];
  needs[2] = needs_s || needs_t;
  const at::Tensor right = t ? dense(B, *t, type) : B;
  Grads grads = order == Order::kProduct
                    ? backward_product(sizes, grad_y, x, A, right, scaling, type, needs)
                    : backward_steps(Steps(sizes, order, A, right, std::nullopt, scaling, type), grad_y, x, needs);
  if (!t) return grads;
  const at::ScalarType acc = acc_type(type);
  if (needs_t) grads.t = at::bmm(as_type(B, acc).transpose(1, 2), grads.B);
  if (needs_s) grads.B = at::bmm(grads.B, as_type(*t, acc).transpose(1, 2));
  return grads;
}

at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                       const OptionalTensor& bias, double scaling) {
  check_kron(x, A, B, t, bias, scaling);
  const c10::cuda::CUDAGuard guard(x.device());
  const Sizes sizes(A, B, t);
  const at::Tensor rows = as_rows(x);
  if (rows.size(0) == 0) return with_leading_sizes(at::empty({0, sizes.out()}, x.options()), x);
  return with_leading_sizes(forward(sizes, rows, A, B, t, bias, scaling), x);
}

std::vector<at::Tensor> kron_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                             const at::Tensor& B, const OptionalTensor& t, double scaling,
                                             Needs needs) {
  check_kron(x, A, B, t, std::nullopt, scaling);
  const c10::cuda::CUDAGuard guard(x.device());
  const Sizes sizes(A, B, t);
  check_kron_grad(grad_y, x, sizes.out());
  TORCH_CHECK_VALUE(t || !needs[3], "needs asks for the gradient of t, which is not given");
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const bool needs_product = needs[0] || needs[1] || needs[2] || needs[3];
  Grads grads;
  if (needs_product && rows.size(0) == 0) {
    grads = empty_grads(sizes, x, A, B, t);
  } else if (needs_product) {
    grads = backward(sizes, grad_rows, rows, A, B, t, scaling, needs);
  }
  return collect(grads, needs, grad_rows, x, A.scalar_type());
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("kron_linear", kron_linear);
  m.impl("kron_linear_backward", kron_linear_backward);
}

}  // namespace
}  // namespace peft_ext::cuda
