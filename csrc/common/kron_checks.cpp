#include "common/kron_checks.h"

#include <cmath>

#include "common/checks.h"

namespace peft_ext {
namespace {

void check_factor(const char* name, const at::Tensor& factor, const at::Tensor& A, const at::Tensor& x) {
  TORCH_CHECK_TYPE(is_supported(factor.scalar_type()), name, " must be float32, float64, bfloat16 or float16, but is ",
                   factor.scalar_type());
  TORCH_CHECK_TYPE(factor.scalar_type() == A.scalar_type(), name, " is ", factor.scalar_type(), ", but A is ",
                   A.scalar_type(), ": A, B, t and bias must have one dtype");
  TORCH_CHECK_VALUE(factor.device() == x.device(), name, " is on ", factor.device(), ", but x on ", x.device());
}

void check_terms(const char* name, const at::Tensor& factor, const at::Tensor& A, const at::Tensor& x) {
  check_factor(name, factor, A, x);
  TORCH_CHECK_VALUE(factor.dim() == 3 && factor.numel() > 0, name,
                    " must have 3 dimensions, none of them empty, but has shape ", factor.sizes());
  TORCH_CHECK_VALUE(factor.size(0) == A.size(0), name, " must have the ", A.size(0), " terms of A ", A.sizes(),
                    ", but has shape ", factor.sizes());
}

}  // namespace

void check_kron(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const std::optional<at::Tensor>& t,
                const std::optional<at::Tensor>& bias, double scaling) {
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), "x must be float32, float64, bfloat16 or float16, but is ",
                   x.scalar_type());
  check_terms("A", A, A, x);
  check_terms("B", B, A, x);
  TORCH_CHECK_TYPE(A.scalar_type() != at::kDouble || x.scalar_type() == at::kDouble,
                   "A is float64, which only a float64 x takes, but x is ", x.scalar_type());
  if (t) {
    check_terms("t", *t, A, x);
    TORCH_CHECK_VALUE(t->size(1) == B.size(2), "t must be [", A.size(0), ", ", B.size(2), ", b_out] for B ", B.sizes(),
                      ", but has shape ", t->sizes());
  }
  const int64_t in_features = A.size(1) * B.size(1), out_features = A.size(2) * (t ? t->size(2) : B.size(2));
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == in_features, "x must be [..., ", in_features, "] for A ", A.sizes(),
                    " and B ", B.sizes(), ", but has shape ", x.sizes());
  if (bias) {
    check_factor("bias", *bias, A, x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == out_features, "bias must be [", out_features,
                      "], but has shape ", bias->sizes());
  }
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, but is ", scaling);
}

void check_kron_grad(const at::Tensor& grad_y, const at::Tensor& x, int64_t out_features) {
  check_saved("grad_y", grad_y, with_last_size(x.sizes(), out_features), x.scalar_type(), x.device());
}

}  // namespace peft_ext
