#include "common/prefix_attention_checks.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "common/checks.h"

namespace peft_ext {
namespace {

void check_like(const char* name, const at::Tensor& tensor, const at::Tensor& q) {
  TORCH_CHECK_VALUE(tensor.device() == q.device(), name, " is on ", tensor.device(), ", but q on ", q.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == q.scalar_type(), name, " is ", tensor.scalar_type(), ", but q is ",
                   q.scalar_type());
}

void check_keys(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_TYPE(is_supported(q.scalar_type()), "q must be float32, float64, bfloat16 or float16, but is ",
                   q.scalar_type());
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) > 0,
                    "q must be [batch, heads, queries, head_dim] with head_dim > 0, but has shape ", q.sizes());
  check_like("k", k, q);
  check_like("v", v, q);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3), "k must be [", q.size(0),
                    ", kv_heads, keys, ", q.size(3), "] for q ", q.sizes(), ", but has shape ", k.sizes());
  TORCH_CHECK_VALUE(v.sizes() == k.sizes(), "v must have k's shape ", k.sizes(), ", but has shape ", v.sizes());
  TORCH_CHECK_VALUE(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k has ", k.size(1),
                    " heads, which do not divide q's ", q.size(1));
}

void check_prefix(const char* name, const at::Tensor& prefix, const at::Tensor& q, const at::Tensor& k) {
  TORCH_CHECK_VALUE(prefix.dim() == 3 && prefix.size(1) == k.size(1) && prefix.size(2) == k.size(3), name,
                    " must be [prefix_len, ", k.size(1), ", ", k.size(3), "] for k ", k.sizes(), ", but has shape ",
                    prefix.sizes());
  TORCH_CHECK_VALUE(prefix.device() == q.device(), name, " is on ", prefix.device(), ", but q on ", q.device());
  TORCH_CHECK_TYPE(
      prefix.scalar_type() == q.scalar_type() || (prefix.scalar_type() == at::kFloat && q.scalar_type() != at::kDouble),
      name, " must have q's dtype ", q.scalar_type(), q.scalar_type() == at::kDouble ? "" : " or be float32",
      ", but is ", prefix.scalar_type());
}

void check_mask(const at::Tensor& mask, const at::Tensor& q, const at::Tensor& k) {
  const auto type = mask.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == q.scalar_type() || type == at::kFloat,
                   "attn_mask must be bool, float32 or of q's dtype ", q.scalar_type(), ", but is ", type);
  TORCH_CHECK_VALUE(mask.device() == q.device(), "attn_mask is on ", mask.device(), ", but q on ", q.device());
  const int64_t sizes[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    const int64_t size = mask.size(-1 - i);
    fits = size == 1 || size == sizes[3 - i];
  }
  TORCH_CHECK_VALUE(fits, "attn_mask must broadcast to [batch, heads, queries, keys] = ", at::IntArrayRef(sizes),
                    ", but has shape ", mask.sizes());
}

}  // namespace

void check_prefix_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_key,
                            const at::Tensor& prefix_value, const std::optional<at::Tensor>& attn_mask, double scale,
                            double dropout_p, const std::optional<at::Tensor>& seed) {
  check_keys(q, k, v);
  check_prefix("prefix_key", prefix_key, q, k);
  check_prefix("prefix_value", prefix_value, q, k);
  TORCH_CHECK_VALUE(prefix_value.sizes() == prefix_key.sizes(), "prefix_value must have prefix_key's shape ",
                    prefix_key.sizes(), ", but has shape ", prefix_value.sizes());
  if (attn_mask) check_mask(*attn_mask, q, k);
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale must be finite, but is ", scale);
  check_dropout(dropout_p, seed, q.device());
}

void check_prefix_attention_saved(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& out,
                                  const at::Tensor& lse) {
  check_saved("grad_out", grad_out, q.sizes(), q.scalar_type(), q.device());
  check_saved("out", out, q.sizes(), q.scalar_type(), q.device());
  check_saved("lse", lse, q.sizes().slice(0, 3), acc_type(q.scalar_type()), q.device());
}

at::Tensor make_output(const at::Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

}  // namespace peft_ext
