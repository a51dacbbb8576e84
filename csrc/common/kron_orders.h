// y = x H (+ bias), H = scaling sum_i A_i (x) B_i, by plain products. With x [m, a_in, b_in] and y [m, a_out, b_out]
// four orders lead to the result, and counted cost decides for each call:
//
//   factors   x S, mixed by A, then T (B_i = s_i t_i): each device has its own
//   B first   x [B_1 .. B_n], then the A_i; for b_out < b_in
//   A first   the A_i on x, then [B_1; ..; B_n]; for b_in < b_out
//   product   H, then x H; where n or the rank is so large that nothing is gained by factors
//
// The last three form s_i t_i if B is given by factors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <array>
#include <optional>

namespace peft_ext::kron {

using OptionalTensor = std::optional<at::Tensor>;
using Needs = std::array<bool, 5>;  // x, A, B, t, bias

struct Sizes {
  Sizes(const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t)
      : n(A.size(0)),
        a_in(A.size(1)),
        a_out(A.size(2)),
        b_in(B.size(1)),
        b_out(t ? t->size(2) : B.size(2)),
        rank(t ? t->size(1) : 0) {}

  int64_t in() const { return a_in * b_in; }
  int64_t out() const { return a_out * b_out; }
  int64_t inner() const { return n * rank; }

  const int64_t n, a_in, a_out, b_in, b_out;
  const int64_t rank;  // 0: B is dense.
};

enum class Order { kFactors, kBFirst, kAFirst, kProduct };

// Multiply-adds of a pass over m rows. What is not one large GEMM reaches a part of its speed; these are estimates:
// the fused loops half, small batched products a quarter, after kStart for every row.
inline Order choose_order(const Sizes& s, int64_t m) {
  constexpr int64_t kFused = 2, kBatched = 4, kStart = 4096, kTraffic = 8;
  const int64_t form_B = s.n * s.b_in * s.rank * s.b_out, mix = s.n * s.a_in * s.a_out;
  const int64_t b_first = form_B + m * (s.in() * s.n * s.b_out + kBatched * mix * s.b_out + kStart);
  const int64_t a_first = form_B + m * (kBatched * mix * s.b_in + kStart + s.out() * s.n * s.b_in);
  const int64_t product = form_B + (s.n + kTraffic) * s.in() * s.out() + m * s.in() * s.out();
  const int64_t factors = kFused * m * (s.in() * s.inner() + mix * s.rank + s.out() * s.inner());
  const int64_t best = std::min({b_first, a_first, product});
  if (s.rank > 0 && factors <= best) return Order::kFactors;
  if (b_first == best) return Order::kBFirst;
  return a_first == best ? Order::kAFirst : Order::kProduct;
}

struct Grads {
  at::Tensor x, A, B, t;  // Of x as rows; undefined where not needed.
};

// --- B first: z[m,p,i,v] = sum_u x[m,p,u] B_i[u,v], y[m,q,v] = sum_(p,i) A_i[p,q] z[m,p,i,v] ---

inline at::Tensor beside(const at::Tensor& terms) {  // [n, k, l] as [k, n l]
  return terms.permute({1, 0, 2}).reshape({terms.size(1), -1});
}

inline at::Tensor forward_b_first(const Sizes& s, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  const int64_t m = x.size(0);
  const at::Tensor z = at::mm(x.reshape({m * s.a_in, s.b_in}), beside(B)).view({m, s.a_in * s.n, s.b_out});
  return at::matmul(A.permute({2, 1, 0}).reshape({s.a_out, -1}), z).reshape({m, s.out()});
}

// Sum over rows of left_m right_m^T: [rows, k, w] and [rows, l, w] to [k, l].
inline at::Tensor sum_of_outer(const at::Tensor& left, const at::Tensor& right) {
  const auto flat = [](const at::Tensor& rows) { return rows.transpose(0, 1).reshape({rows.size(1), -1}); };
  return at::mm(flat(left), flat(right).t());
}

inline Grads backward_b_first(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
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

inline at::Tensor mixed_input(const Sizes& s, const at::Tensor& x, const at::Tensor& A) {
  const int64_t m = x.size(0);
  const at::Tensor left = A.permute({2, 0, 1}).reshape({s.a_out * s.n, s.a_in});
  return at::matmul(left, x.view({m, s.a_in, s.b_in})).reshape({m * s.a_out, s.n * s.b_in});
}

inline at::Tensor forward_a_first(const Sizes& s, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  return at::mm(mixed_input(s, x, A), B.reshape({s.n * s.b_in, s.b_out})).view({x.size(0), s.out()});
}

inline Grads backward_a_first(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
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

inline at::Tensor product(const Sizes& s, const at::Tensor& A, const at::Tensor& B) {
  return at::mm(A.reshape({s.n, -1}).t(), B.reshape({s.n, -1}))
      .view({s.a_in, s.a_out, s.b_in, s.b_out})
      .transpose(1, 2)
      .reshape({s.in(), s.out()});
}

inline Grads backward_product(const Sizes& s, const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& A,
                              const at::Tensor& B, const Needs& needs) {
  Grads grads;
  if (needs[0]) grads.x = at::mm(grad_y, product(s, A, B).t());
  if (!needs[1] && !needs[2]) return grads;
  const at::Tensor grad_H = at::mm(x.t(), grad_y)
                                .view({s.a_in, s.b_in, s.a_out, s.b_out})
                                .transpose(1, 2)
                                .reshape({s.a_in * s.a_out, s.b_in * s.b_out});
  if (needs[1]) grads.A = at::mm(B.reshape({s.n, -1}), grad_H.t()).view({s.n, s.a_in, s.a_out});
  if (needs[2]) grads.B = at::mm(A.reshape({s.n, -1}), grad_H).view({s.n, s.b_in, s.b_out});
  return grads;
}

// y for an order without factors; all in one type.
inline at::Tensor dense_forward(Order order, const Sizes& s, const at::Tensor& x, const at::Tensor& A,
                                const at::Tensor& B) {
  if (order == Order::kBFirst) return forward_b_first(s, x, A, B);
  if (order == Order::kAFirst) return forward_a_first(s, x, A, B);
  return at::mm(x, product(s, A, B));
}

// The gradients for an order without factors; with t, B is its left factor.
inline Grads dense_backward(Order order, const Sizes& sizes, const at::Tensor& grad_y, const at::Tensor& x,
                            const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t, double scaling,
                            Needs needs) {
  const bool needs_s = needs[2], needs_t = needs[3];
  needs[2] = needs_s || needs_t;
  const at::Tensor dense = t ? at::bmm(B, *t) : B, scaled = scaling == 1.0 ? A : A.mul(scaling);
  const auto run = order == Order::kBFirst   ? backward_b_first
                   : order == Order::kAFirst ? backward_a_first
                                             : backward_product;
  Grads grads = run(sizes, grad_y, x, scaled, dense, needs);
  if (needs[1]) grads.A = grads.A.mul(scaling);
  if (!t) return grads;
  if (needs_t) grads.t = at::bmm(B.transpose(1, 2), grads.B);
  if (needs_s) grads.B = at::bmm(grads.B, t->transpose(1, 2));
  return grads;
}

}  // namespace peft_ext::kron
