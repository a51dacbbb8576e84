// What kron_linear is on every device: sizes, orders, and what a backward gives.
//
// With x [m, a_in, b_in] and y [m, a_out, b_out] four orders lead to y = x H (+ bias), H = scaling sum_i A_i (x) B_i,
// and each device chooses by its own cost:
//
//   factors   x S, mixed by A, then T (B_i = s_i t_i)
//   B first   x [B_1 .. B_n], then the A_i; for b_out < b_in
//   A first   the A_i on x, then [B_1; ..; B_n]; for b_in < b_out
//   product   H, then x H; where n or the rank is so large that nothing is gained by factors
//
// The last three form s_i t_i if B is given by factors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <vector>

#include "common/tensors.h"

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

struct Grads {
  at::Tensor x, A, B, t;  // Of x as rows; undefined where not needed.
};

// Of no rows: nothing for x, zeros for the factors.
inline Grads empty_grads(const Sizes& sizes, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                         const OptionalTensor& t) {
  return {at::empty({0, sizes.in()}, x.options()), at::zeros(A.sizes(), A.options()), at::zeros(B.sizes(), B.options()),
          t ? at::zeros(t->sizes(), t->options()) : at::Tensor()};
}

// What the backward returns: those that are needed, of the types of x and the factors, and the bias's from grad_y.
inline std::vector<at::Tensor> collect(const Grads& grads, const Needs& needs, const at::Tensor& grad_rows,
                                       const at::Tensor& x, at::ScalarType factor_type) {
  std::vector<at::Tensor> result;
  if (needs[0]) result.push_back(with_leading_sizes(as_type(grads.x, x.scalar_type()), x));
  if (needs[1]) result.push_back(as_type(grads.A, factor_type).contiguous());
  if (needs[2]) result.push_back(as_type(grads.B, factor_type).contiguous());
  if (needs[3]) result.push_back(as_type(grads.t, factor_type).contiguous());
  if (needs[4]) result.push_back(as_type(at::sum(grad_rows, 0, false, acc_type(x.scalar_type())), factor_type));
  return result;
}

}  // namespace peft_ext::kron
