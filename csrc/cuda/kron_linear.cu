// kron_linear on the device: the orders of common/kron_orders.h. That by factors is
//
//   u[m,p,i,j] = sum_b x[m,p,b] s_i[b,j];  w[m,q,i,j] = scaling sum_p A_i[p,q] u[m,p,i,j];
//   y[m,q,v]   = sum_(i,j) w[m,q,i,j] t_i[j,v]
//
// whose outer steps are GEMMs of at:: over all (m, p), and the middle one a kernel with a thread an element of w.
//
// Types   Half-precision factors of x's type are multiplied as they are and accumulated in float32; else everything is
//         in the accumulation type (float32; float64 for a float64 x). y is rounded once. The forward keeps nothing.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "common/kron_checks.h"
#include "common/kron_orders.h"
#include "common/rows.h"
#include "cuda/gemm.h"
#include "cuda/scope.h"
#include "cuda/vectors.h"

namespace peft_ext {
namespace {

using namespace kron;

constexpr int kThreads = 256;

// out[m, l, i, j] = sum_k A[i, k, l] in[m, k, i, j], with strides of A for k and l.
template <class C, class G>
__global__ void __launch_bounds__(kThreads)
    mix_terms(const C* in, const C* A, G* out, int64_t count, int64_t outer, int64_t inner, int64_t terms, int64_t rank,
              int64_t term_stride, int64_t inner_stride, int64_t outer_stride) {
  const int64_t width = terms * rank;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t column = at % width, l = at / width % outer, row = at / width / outer;
    const C* a = A + column / rank * term_stride + l * outer_stride;
    const C* from = in + row * inner * width + column;
    C sum = 0;
    for (int64_t k = 0; k < inner; ++k) sum += a[k * inner_stride] * from[k * width];
    out[at] = static_cast<G>(sum);
  }
}

enum class Direction { kForward, kBackward };

// u to w, or the gradient of w to that of u; A is contiguous.
at::Tensor mix(const Sizes& s, const at::Tensor& in, const at::Tensor& A, at::ScalarType type, Direction direction) {
  const bool forward = direction == Direction::kForward;
  const int64_t inner = forward ? s.a_in : s.a_out, outer = forward ? s.a_out : s.a_in;
  const at::Tensor out = at::empty({in.size(0) / inner * outer, in.size(1)}, in.options().dtype(type));
  if (out.numel() == 0) return out;
  dispatch_storage(type, [&](auto g) {
    using G = decltype(g);
    using C = Acc<G>;
    launch(mix_terms<C, G>, dim3(grid_size(blocks_for(out.numel(), kThreads), 1 << 16)), dim3(kThreads), 0,
           in.const_data_ptr<C>(), A.const_data_ptr<C>(), out.data_ptr<G>(), out.numel(), outer, inner, s.n, s.rank,
           s.a_in * s.a_out, forward ? s.a_out : int64_t{1}, forward ? int64_t{1} : s.a_out);
  });
  return out;
}

// The factors as the products take them.
struct Factors {
  Factors(const Sizes& sizes, const at::Tensor& A, const at::Tensor& B, const at::Tensor& t, double scaling,
          at::ScalarType type)
      : A(as_type(A, acc_type(type)).mul(scaling).contiguous()),
        s(as_type(B, type).permute({1, 0, 2}).reshape({sizes.b_in, sizes.inner()})),
        t(as_type(t, type).reshape({sizes.inner(), sizes.b_out})),
        type(type) {}

  at::Tensor A, s, t;  // [n, a_in, a_out] of the accumulation type; [b_in, n rank], [n rank, b_out].
  at::ScalarType type;
};

at::Tensor forward_factors(const Sizes& sizes, const at::Tensor& x, const Factors& factors,
                           const OptionalTensor& bias) {
  const int64_t m = x.size(0);
  const at::Tensor u = mm_wide(as_type(x, factors.type).reshape({m * sizes.a_in, sizes.b_in}), factors.s);
  const at::Tensor w = mix(sizes, u, factors.A, factors.type, Direction::kForward);
  if (!bias && factors.type == x.scalar_type()) return at::mm(w, factors.t).view({m, sizes.out()});
  const at::Tensor y = mm_wide(w, factors.t).view({m, sizes.out()});
  if (bias) y.add_(as_type(*bias, y.scalar_type()));
  return y;
}

Grads backward_factors(const Sizes& sizes, const at::Tensor& grad_y, const at::Tensor& x, const Factors& factors,
                       double scaling, const Needs& needs) {
  const auto [needs_x, needs_A, needs_s, needs_t, _] = needs;
  const int64_t m = x.size(0), n = sizes.n, rank = sizes.rank;
  const at::Tensor x_rows = as_type(x, factors.type).reshape({m * sizes.a_in, sizes.b_in});
  const at::Tensor grad_y_rows = as_type(grad_y, factors.type).reshape({m * sizes.a_out, sizes.b_out});
  Grads grads;
  const at::Tensor u = needs_A || needs_t ? mm_wide(x_rows, factors.s) : at::Tensor();
  if (needs_t) {
    const at::Tensor w = mix(sizes, u, factors.A, factors.type, Direction::kForward);
    grads.t = mm_wide(w.t(), grad_y_rows).view({n, rank, sizes.b_out});
  }
  if (!needs_x && !needs_A && !needs_s) return grads;
  const at::Tensor grad_w = mm_wide(grad_y_rows, factors.t.t());
  if (needs_A) {
    const at::Tensor left = u.view({m, sizes.a_in, n, rank}).permute({2, 1, 0, 3}).reshape({n, sizes.a_in, m * rank});
    const at::Tensor right =
        grad_w.view({m, sizes.a_out, n, rank}).permute({2, 0, 3, 1}).reshape({n, m * rank, sizes.a_out});
    grads.A = at::bmm(left, right).mul(scaling);
  }
  if (!needs_x && !needs_s) return grads;
  const at::Tensor grad_u = mix(sizes, grad_w, factors.A, factors.type, Direction::kBackward);
  if (needs_s) grads.B = mm_wide(x_rows.t(), grad_u).view({sizes.b_in, n, rank}).transpose(0, 1);
  if (needs_x) grads.x = at::mm(grad_u, factors.s.t()).view({m, sizes.in()});
  return grads;
}

// What the products by factors are computed in.
at::ScalarType product_type(const at::Tensor& x, const at::Tensor& A) {
  return A.scalar_type() == x.scalar_type() ? x.scalar_type() : acc_type(x.scalar_type());
}

at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                       const OptionalTensor& bias, double scaling) {
  check_kron(x, A, B, t, bias, scaling);
  const OpScope scope(x);
  const Sizes sizes(A, B, t);
  const at::Tensor rows = as_rows(x);
  if (rows.size(0) == 0) return with_leading_sizes(at::empty({0, sizes.out()}, x.options()), x);
  const Order order = choose_order(sizes, rows.size(0));
  at::Tensor y;
  if (order == Order::kFactors) {
    y = forward_factors(sizes, rows, Factors(sizes, A, B, *t, scaling, product_type(x, A)), bias);
  } else {
    const at::ScalarType type = acc_type(x.scalar_type());
    const at::Tensor b = as_type(B, type);
    y = dense_forward(order, sizes, as_type(rows, type).contiguous(), as_type(A, type).mul(scaling),
                      t ? at::bmm(b, as_type(*t, type)) : b);
    if (bias) y.add_(as_type(*bias, type));
  }
  return with_leading_sizes(as_type(y, x.scalar_type()), x);
}

Grads backward(const Sizes& sizes, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
               const at::Tensor& B, const OptionalTensor& t, double scaling, const Needs& needs) {
  const Order order = choose_order(sizes, x.size(0));
  if (order == Order::kFactors) {
    return backward_factors(sizes, grad_y, x, Factors(sizes, A, B, *t, scaling, product_type(x, A)), scaling, needs);
  }
  const at::ScalarType type = acc_type(x.scalar_type());
  return dense_backward(order, sizes, as_type(grad_y, type).contiguous(), as_type(x, type).contiguous(),
                        as_type(A, type), as_type(B, type), t ? OptionalTensor(as_type(*t, type)) : std::nullopt,
                        scaling, needs);
}

std::vector<at::Tensor> kron_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                             const at::Tensor& B, const OptionalTensor& t, double scaling,
                                             Needs needs) {
  check_kron(x, A, B, t, std::nullopt, scaling);
  const OpScope scope(x);
  const Sizes sizes(A, B, t);
  check_kron_grad(grad_y, x, sizes.out());
  TORCH_CHECK_VALUE(t || !needs[3], "needs asks for the gradient of t, which is not given");
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y);
  const bool needs_product = needs[0] || needs[1] || needs[2] || needs[3];
  Grads grads;
  if (needs_product && rows.size(0) == 0) {
    grads = {at::empty({0, sizes.in()}, x.options()), at::zeros(A.sizes(), A.options()),
             at::zeros(B.sizes(), B.options()), t ? at::zeros(t->sizes(), t->options()) : at::Tensor()};
  } else if (needs_product) {
    grads = backward(sizes, grad_rows, rows, A, B, t, scaling, needs);
  }
  std::vector<at::Tensor> result;
  if (needs[0]) result.push_back(with_leading_sizes(as_type(grads.x, x.scalar_type()), x));
  if (needs[1]) result.push_back(as_type(grads.A, A.scalar_type()).contiguous());
  if (needs[2]) result.push_back(as_type(grads.B, B.scalar_type()).contiguous());
  if (needs[3]) result.push_back(as_type(grads.t, A.scalar_type()).contiguous());
  if (needs[4]) {
    result.push_back(as_type(at::sum(grad_rows, 0, false, acc_type(x.scalar_type())), A.scalar_type()));
  }
  return result;
}

TORCH_LIBRARY_IMPL(peft_ext, CUDA, m) {
  m.impl("kron_linear", kron_linear);
  m.impl("kron_linear_backward", kron_linear_backward);
}

}  // namespace
}  // namespace peft_ext
