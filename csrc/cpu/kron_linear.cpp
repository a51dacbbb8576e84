// kron_linear on the CPU: the orders of common/kron_orders.h, that by factors in fused loops over blocks of rows
// (kernels/kron_linear.h). All compute and sum in the accumulation type (float32; float64 for a float64 x), the product
// of bfloat16 on AMX where there is one, and round once. The forward keeps nothing: the backward recomputes.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "common/kron_checks.h"
#include "common/kron_orders.h"
#include "cpu/chunk_sums.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/tiles.h"

namespace peft_ext {
namespace {

using namespace kron;

// Whether x H runs on AMX.
bool product_by_tiles(const at::Tensor& rows) {
  constexpr int64_t kFewRows = 32;
  return uses_tiles(rows, kFewRows);
}

// Multiply-adds of a pass over all rows. What is not one large GEMM reaches a part of its speed; these are estimates:
// the fused loops half, small batched products a quarter, after kStart for every row. A dense B's product on AMX is
// faster once H is packed, and the other orders widen x and round y first.
Order choose_order(const Sizes& s, const at::Tensor& rows) {
  constexpr int64_t kFused = 2, kBatched = 4, kStart = 4096, kWiden = 12;
  const bool tiles = s.rank == 0 && product_by_tiles(rows);
  const int64_t m = rows.size(0), speed = tiles ? 8 : 1, traffic = tiles ? 64 : 8;
  const int64_t widen = tiles ? kWiden * (s.in() + s.out()) : 0;
  const int64_t form_B = s.n * s.b_in * s.rank * s.b_out, mix = s.n * s.a_in * s.a_out;
  const int64_t b_first = form_B + m * (s.in() * s.n * s.b_out + kBatched * mix * s.b_out + kStart + widen);
  const int64_t a_first = form_B + m * (kBatched * mix * s.b_in + kStart + widen + s.out() * s.n * s.b_in);
  const int64_t product = form_B + (s.n + traffic) * s.in() * s.out() + m * s.in() * s.out() / speed;
  const int64_t factors = kFused * m * (s.in() * s.inner() + mix * s.rank + s.out() * s.inner());
  const int64_t best = std::min({b_first, a_first, product});
  if (s.rank > 0 && factors <= best) return Order::kFactors;
  if (b_first == best) return Order::kBFirst;
  return a_first == best ? Order::kAFirst : Order::kProduct;
}

// --- factors ---

// A and B in the forms that kernels/kron_linear.h describes.
class Factors {
 public:
  Factors(const Sizes& sizes, const at::Tensor& A, const at::Tensor& s, const at::Tensor& t, double scaling)
      : sizes_(sizes) {
    const at::Tensor mixed = scaling == 1.0 ? A : A.mul(scaling);
    mix_ = mixed.permute({1, 2, 0}).unsqueeze(-1).expand({-1, -1, -1, sizes.rank}).contiguous();
    s_ = s.permute({1, 0, 2}).contiguous();
    s_t_ = s.transpose(1, 2).contiguous();
    t_ = t.contiguous();
    t_t_ = t_.view({sizes.inner(), sizes.b_out}).t().contiguous();
  }

  void fill(KronProblem& problem, const at::Tensor& x) const {
    problem.widen = acc_type(x.scalar_type()) != x.scalar_type();
    problem.block = std::min(lora_block_rows(sizes_.in(), sizes_.out()), x.size(0));
    problem.a_in = sizes_.a_in;
    problem.a_out = sizes_.a_out;
    problem.b_in = sizes_.b_in;
    problem.b_out = sizes_.b_out;
    problem.inner = sizes_.inner();
    problem.mix = mix_.const_data_ptr();
    problem.s = s_.const_data_ptr();
    problem.s_t = s_t_.const_data_ptr();
    problem.t = t_.const_data_ptr();
    problem.t_t = t_t_.const_data_ptr();
    problem.x = x.const_data_ptr();
    problem.x_stride = x.stride(0);
  }

 private:
  const Sizes sizes_;
  at::Tensor mix_, s_, s_t_, t_, t_t_;
};

// Scratch memory for each thread that gets some of the tasks.
at::Tensor make_workspace(const KronProblem& problem, int64_t tasks, const at::Tensor& like) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  return at::empty({threads, KronWorkspace(problem).elements()}, like.options());
}

at::Tensor forward_factors(const Sizes& sizes, const at::Tensor& x, const at::Tensor& A, const at::Tensor& s,
                           const at::Tensor& t, const OptionalTensor& bias, double scaling) {
  const int64_t m = x.size(0);
  const at::Tensor y = at::empty({m, sizes.out()}, x.options());
  const Factors factors(sizes, A, s, t, scaling);
  const at::Tensor row = bias ? as_type(*bias, acc_type(x.scalar_type())).contiguous() : at::Tensor();
  KronForward problem{};
  factors.fill(problem, x);
  problem.bias = row.defined() ? row.const_data_ptr() : nullptr;
  problem.y = y.data_ptr();
  problem.y_stride = y.stride(0);
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  const auto& kernels = kron_kernels(x.scalar_type());
  run_tasks(blocks, make_workspace(problem, blocks, A), [&](int64_t begin, int64_t end, void* memory) {
    kernels.forward(problem, begin * block, std::min(m, end * block), memory);
  });
  return y;
}

Grads backward_factors(const Sizes& sizes, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                       const at::Tensor& s, const at::Tensor& t, double scaling, const Needs& needs) {
  const auto [needs_x, needs_A, needs_s, needs_t, _] = needs;
  const int64_t m = x.size(0), n = sizes.n, rank = sizes.rank;
  const int64_t chunks = count_factor_chunks(m, sizes.inner());
  const ChunkSums grad_mix(needs_A, chunks, {sizes.a_in, sizes.a_out, n, rank}, A.options()),
      grad_s_t(needs_s, chunks, {n, rank, sizes.b_in}, A.options()),
      grad_t(needs_t, chunks, {n, rank, sizes.b_out}, A.options());
  Grads grads;
  if (needs_x) grads.x = at::empty({m, sizes.in()}, x.options());
  const Factors factors(sizes, A, s, t, scaling);
  KronBackward problem{};
  factors.fill(problem, x);
  problem.grad_y = grad_y.const_data_ptr();
  problem.grad_y_stride = grad_y.stride(0);
  problem.grad_x = needs_x ? grads.x.data_ptr() : nullptr;
  problem.grad_x_stride = sizes.in();
  const auto& kernels = kron_kernels(x.scalar_type());
  run_tasks(chunks, make_workspace(problem, chunks, A), [&](int64_t begin, int64_t end, void* memory) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const KronFactorGrads out{grad_mix.of_chunk(chunk), grad_s_t.of_chunk(chunk), grad_t.of_chunk(chunk)};
      kernels.backward(problem, out, chunk * m / chunks, (chunk + 1) * m / chunks, memory);
    }
  });
  if (needs_A) grads.A = grad_mix.total().sum(-1).permute({2, 0, 1}).mul(scaling);
  if (needs_s) grads.B = grad_s_t.total().transpose(1, 2);
  if (needs_t) grads.t = grad_t.total();
  return grads;
}

// --- B first: z[m,p,i,v] = sum_u x[m,p,u] B_i[u,v], y[m,q,v] = sum_(p,i) A_i[p,q] z[m,p,i,v] ---

at::Tensor beside(const at::Tensor& terms) {  // [n, k, l] as [k, n l]
  return terms.permute({1, 0, 2}).reshape({terms.size(1), -1});
}

at::Tensor forward_b_first(const Sizes& s, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  const int64_t m = x.size(0);
  const at::Tensor z = at::mm(x.reshape({m * s.a_in, s.b_in}), beside(B)).view({m, s.a_in * s.n, s.b_out});
  return at::matmul(A.permute({2, 1, 0}).reshape({s.a_out, -1}), z).reshape({m, s.out()});
}

// Sum over rows of left_m right_m^T: [rows, k, w] and [rows, l, w] to [k, l].
at::Tensor sum_of_outer(const at::Tensor& left, const at::Tensor& right) {
  const auto flat = [](const at::Tensor& rows) { return rows.transpose(0, 1).reshape({rows.size(1), -1}); };
  return at::mm(flat(left), flat(right).t());
}

Grads backward_b_first(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                       const at::Tensor& B, const Needs& needs) {
  const int64_t m = x.size(0);
  const at::Tensor x_rows = x.reshape({m * s.a_in, s.b_in}), grad_y_rows = grad_y.view({m, s.a_out, s.b_out});
  Grads grads;
  if (needs[1]) {
    const at::Tensor z = at::mm(x_rows, beside(B)).view({m, s.a_in * s.n, s.b_out});
    grads.A = sum_of_outer(z, grad_y_rows).view({s.a_in, s.n, s.a_out}).transpose(0, 1);
  }
  if (!needs[0] && !needs[2]) return grads;
  const at::Tensor grad_z =
      at::matmul(A.transpose(0, 1).reshape({-1, s.a_out}), grad_y_rows).reshape({m * s.a_in, s.n * s.b_out});
  if (needs[0]) grads.x = at::mm(grad_z, beside(B).t()).view({m, s.in()});
  if (needs[2]) grads.B = at::mm(x_rows.t(), grad_z).view({s.b_in, s.n, s.b_out}).transpose(0, 1);
  return grads;
}

// --- A first: w[m,q,i,u] = sum_p A_i[p,q] x[m,p,u], y[m,q,v] = sum_(i,u) w[m,q,i,u] B_i[u,v] ---

at::Tensor mixed_input(const Sizes& s, const at::Tensor& x, const at::Tensor& A) {
  const int64_t m = x.size(0);
  const at::Tensor left = A.permute({2, 0, 1}).reshape({s.a_out * s.n, s.a_in});
  return at::matmul(left, x.view({m, s.a_in, s.b_in})).reshape({m * s.a_out, s.n * s.b_in});
}

at::Tensor forward_a_first(const Sizes& s, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  return at::mm(mixed_input(s, x, A), B.reshape({s.n * s.b_in, s.b_out})).view({x.size(0), s.out()});
}

Grads backward_a_first(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                       const at::Tensor& B, const Needs& needs) {
  const int64_t m = x.size(0);
  const at::Tensor grad_y_rows = grad_y.view({m * s.a_out, s.b_out});
  Grads grads;
  if (needs[2]) grads.B = at::mm(mixed_input(s, x, A).t(), grad_y_rows).view({s.n, s.b_in, s.b_out});
  if (!needs[0] && !needs[1]) return grads;
  const at::Tensor grad_w =
      at::mm(grad_y_rows, B.reshape({s.n * s.b_in, s.b_out}).t()).view({m, s.a_out * s.n, s.b_in});
  if (needs[0]) {
    grads.x = at::matmul(A.permute({1, 2, 0}).reshape({s.a_in, -1}), grad_w).reshape({m, s.in()});
  }
  if (needs[1]) {
    grads.A = sum_of_outer(x.view({m, s.a_in, s.b_in}), grad_w).view({s.a_in, s.a_out, s.n}).permute({2, 0, 1});
  }
  return grads;
}

// --- product: H[(p,u),(q,v)] = sum_i A_i[p,q] B_i[u,v] ---

at::Tensor product_of_terms(const Sizes& s, const at::Tensor& A, const at::Tensor& B) {  // [a_in, a_out, b_in, b_out]
  return at::mm(A.reshape({s.n, -1}).t(), B.reshape({s.n, -1})).view({s.a_in, s.a_out, s.b_in, s.b_out});
}

at::Tensor product(const Sizes& s, const at::Tensor& A, const at::Tensor& B) {
  return product_of_terms(s, A, B).transpose(1, 2).reshape({s.in(), s.out()});
}

at::Tensor product_t(const Sizes& s, const at::Tensor& A, const at::Tensor& B) {
  return product_of_terms(s, A, B).permute({1, 3, 0, 2}).reshape({s.out(), s.in()});
}

// A's and B's from H's.
void unfold_product_grad(const Sizes& s, const at::Tensor& grad, const at::Tensor& A, const at::Tensor& B,
                         const Needs& needs, Grads& grads) {
  const at::Tensor grad_H =
      grad.view({s.a_in, s.b_in, s.a_out, s.b_out}).transpose(1, 2).reshape({s.a_in * s.a_out, s.b_in * s.b_out});
  if (needs[1]) grads.A = at::mm(B.reshape({s.n, -1}), grad_H.t()).view({s.n, s.a_in, s.a_out});
  if (needs[2]) grads.B = at::mm(A.reshape({s.n, -1}), grad_H).view({s.n, s.b_in, s.b_out});
}

Grads backward_product(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                       const at::Tensor& B, const Needs& needs) {
  Grads grads;
  if (needs[0]) grads.x = at::mm(grad_y, product(s, A, B).t());
  if (needs[1] || needs[2]) unfold_product_grad(s, at::mm(x.t(), grad_y), A, B, needs, grads);
  return grads;
}

// --- product on AMX ---

// x H (+ bias) for H [in, out] of float.
at::Tensor multiply_by_tiles(const at::Tensor& x, const at::Tensor& H, const OptionalTensor& bias) {
  const int64_t m = x.size(0), in = H.size(0), out = H.size(1);
  const at::Tensor y = at::empty({m, out}, x.options());
  const at::Tensor row = bias ? as_type(*bias, at::kFloat).contiguous() : at::Tensor();
  const auto& kernels = kron_kernels(x.scalar_type());
  const at::Tensor product = H.contiguous();
  KronProductPacking packing{product.const_data_ptr(), in, out};
  const at::Tensor tiles = at::empty({packing.elements()}, x.options());
  packing.tiles = tiles.data_ptr();
  kernels.pack_product(packing);

  KronProduct problem{};
  problem.in = in;
  problem.out = out;
  problem.block = tile_block_rows(in, packing.elements() <= kTileCacheValues ? kTileForwardRows : kTileMostRows);
  problem.tiles = tiles.const_data_ptr();
  problem.bias = row.defined() ? row.const_data_ptr() : nullptr;
  problem.x = x.const_data_ptr();
  problem.x_stride = x.stride(0);
  problem.y = y.data_ptr();
  problem.y_stride = out;
  const int64_t share = (m + at::get_num_threads() - 1) / at::get_num_threads();
  problem.block = std::min(problem.block, padded(share, kTileInner));
  const int64_t block = problem.block, blocks = (m + block - 1) / block;
  const int64_t threads = std::min<int64_t>(blocks, at::get_num_threads());
  run_tasks(blocks, at::empty({threads, problem.elements()}, x.options()),
            [&](int64_t begin, int64_t end, void* memory) {
              kernels.multiply_product(problem, begin * block, std::min(m, end * block), memory);
            });
  return y;
}

// x^T grad_y [in, out], with the narrower one's columns as rows of tiles: packing them costs more.
at::Tensor outer_by_tiles(const at::Tensor& x, const at::Tensor& grad_y) {
  const bool swapped = x.size(1) > grad_y.size(1);
  const at::Tensor &left = swapped ? grad_y : x, &right = swapped ? x : grad_y;
  const KronProductGrad problem{x.size(0),    left.const_data_ptr(),  left.stride(0),
                                left.size(1), right.const_data_ptr(), right.stride(0),
                                right.size(1)};
  const at::Tensor total = at::empty({problem.height(), problem.width()}, x.options().dtype(at::kFloat));
  constexpr int64_t kPanel = KronProductGrad::kPanel;
  const int64_t columns = right.size(1), panels = (columns + kPanel - 1) / kPanel;
  const int64_t threads = std::min<int64_t>(panels, at::get_num_threads());
  run_tasks(
      panels, at::empty({threads, problem.elements()}, x.options()), [&](int64_t begin, int64_t end, void* memory) {
        for (int64_t panel = begin; panel < end; ++panel) {
          kron_kernels(x.scalar_type())
              .product_grad(problem, panel * kPanel, std::min(columns, (panel + 1) * kPanel), total.data_ptr(), memory);
        }
      });
  const at::Tensor grad = total.narrow(0, 0, left.size(1)).narrow(1, 0, right.size(1));
  return swapped ? grad.t() : grad;
}

Grads backward_product_by_tiles(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                const at::Tensor& B, const Needs& needs) {
  Grads grads;
  if (needs[0]) grads.x = multiply_by_tiles(grad_y, product_t(s, A, B), std::nullopt);
  if (needs[1] || needs[2]) unfold_product_grad(s, outer_by_tiles(x, grad_y), A, B, needs, grads);
  return grads;
}

// y for an order without factors; all in one type.
at::Tensor dense_forward(Order order, const Sizes& s, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  if (order == Order::kBFirst) return forward_b_first(s, x, A, B);
  if (order == Order::kAFirst) return forward_a_first(s, x, A, B);
  return at::mm(x, product(s, A, B));
}

// The gradients for an order without factors, from rows of the storage type; with t, B is its left factor.
Grads dense_backward(Order order, const Sizes& sizes, const at::Tensor& grad_rows, const at::Tensor& rows,
                     const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t, double scaling, Needs needs) {
  const bool needs_s = needs[2], needs_t = needs[3];
  needs[2] = needs_s || needs_t;
  const at::Tensor dense = t ? at::bmm(B, *t) : B, scaled = scaling == 1.0 ? A : A.mul(scaling);
  const auto run = [&](auto backward, at::ScalarType type) {
    return backward(sizes, as_type(grad_rows, type).contiguous(), as_type(rows, type).contiguous(), scaled, dense,
                    needs);
  };
  Grads grads = order == Order::kBFirst   ? run(backward_b_first, A.scalar_type())
                : order == Order::kAFirst ? run(backward_a_first, A.scalar_type())
                : !product_by_tiles(rows) ? run(backward_product, A.scalar_type())
                                          : backward_product_by_tiles(sizes, grad_rows, rows, scaled, dense, needs);
  if (needs[1]) grads.A = grads.A.mul(scaling);
  if (!t) return grads;
  if (needs_t) grads.t = at::bmm(B.transpose(1, 2), grads.B);
  if (needs_s) grads.B = at::bmm(grads.B, t->transpose(1, 2));
  return grads;
}

// --- the op ---

at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                       const OptionalTensor& bias, double scaling) {
  check_kron(x, A, B, t, bias, scaling);
  const Sizes sizes(A, B, t);
  const at::ScalarType type = acc_type(x.scalar_type());
  const at::Tensor rows = as_rows(x), a = as_type(A, type), b = as_type(B, type);
  const OptionalTensor t_acc = t ? OptionalTensor(as_type(*t, type)) : std::nullopt;
  if (rows.size(0) == 0) return with_leading_sizes(at::empty({0, sizes.out()}, x.options()), x);
  const Order order = choose_order(sizes, rows);
  if (order == Order::kFactors) {
    return with_leading_sizes(forward_factors(sizes, rows, a, b, *t_acc, bias, scaling), x);
  }
  const at::Tensor dense = t_acc ? at::bmm(b, *t_acc) : b, scaled = scaling == 1.0 ? a : a.mul(scaling);
  if (order == Order::kProduct && product_by_tiles(rows)) {
    return with_leading_sizes(multiply_by_tiles(rows, product(sizes, scaled, dense), bias), x);
  }
  const at::Tensor wide = as_type(rows, type).contiguous();
  const at::Tensor y = dense_forward(order, sizes, wide, scaled, dense);
  if (bias) y.add_(as_type(*bias, type));
  return with_leading_sizes(as_type(y, x.scalar_type()), x);
}

std::vector<at::Tensor> kron_linear_backward(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                                             const at::Tensor& B, const OptionalTensor& t, double scaling,
                                             Needs needs) {
  check_kron(x, A, B, t, std::nullopt, scaling);
  const Sizes sizes(A, B, t);
  check_kron_grad(grad_y, x, sizes.out());
  TORCH_CHECK_VALUE(t || !needs[3], "needs asks for the gradient of t, which is not given");
  const at::ScalarType type = acc_type(x.scalar_type());
  const at::Tensor rows = as_rows(x), grad_rows = as_rows(grad_y), a = as_type(A, type), b = as_type(B, type);
  const OptionalTensor t_acc = t ? OptionalTensor(as_type(*t, type)) : std::nullopt;
  const bool needs_product = needs[0] || needs[1] || needs[2] || needs[3];
  Grads grads;
  if (needs_product && rows.size(0) == 0) {
    grads = empty_grads(sizes, x, A, B, t);
  } else if (needs_product) {
    const Order order = choose_order(sizes, rows);
    grads = order == Order::kFactors ? backward_factors(sizes, grad_rows, rows, a, b, *t_acc, scaling, needs)
                                     : dense_backward(order, sizes, grad_rows, rows, a, b, t_acc, scaling, needs);
  }
  return collect(grads, needs, grad_rows, x, A.scalar_type());
}

TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("kron_linear", kron_linear);
  m.impl("kron_linear_backward", kron_linear_backward);
}

}  // namespace
}  // namespace peft_ext
