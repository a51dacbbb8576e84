#include "common/lora_checks.h"

#include <algorithm>
#include <cmath>

#include "common/checks.h"
#include "common/quantized_checks.h"

namespace peft_ext {
namespace {

// An argument, or an element of one that is a list.
struct Name {
  const char* argument;
  int64_t place = -1;
};

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.place < 0 ? out : out << '[' << name.place << ']';
}

void check_matrix(Name name, const at::Tensor& tensor, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()), name, " must be float32, float64, bfloat16 or float16, but is ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must have 2 dimensions, but has shape ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), name, " is on ", tensor.device(), ", but weight on ",
                    weight.device());
}

// The frozen weight, and what a quantized one does not say itself.
struct Base {
  explicit Base(const at::Tensor& weight) : weight(weight), in_features(weight.size(1)), type(weight.scalar_type()) {}
  Base(const at::Tensor& weight, const at::Tensor& x)
      : weight(weight), in_features(in_features_of(weight)), type(x.scalar_type()), typed("x") {}

  const at::Tensor& weight;
  int64_t in_features;
  at::ScalarType type;
  const char* typed = "weight";  // Which argument is of that type.
};

// The two factors of `groups` of the `slices` of a weight; `place` is where they are in their lists.
void check_pair(const Base& base, const at::Tensor& lora_A, const at::Tensor& lora_B, int64_t groups = 1,
                int64_t slices = 1, int64_t place = -1) {
  const at::Tensor& weight = base.weight;
  const Name a{"lora_A", place}, b{"lora_B", place};
  check_matrix(a, lora_A, weight);
  check_matrix(b, lora_B, weight);
  TORCH_CHECK_TYPE(lora_A.scalar_type() == lora_B.scalar_type(), a, " is ", lora_A.scalar_type(), " and ", b, " ",
                   lora_B.scalar_type(), ": both must have one dtype");
  TORCH_CHECK_TYPE(lora_A.scalar_type() != at::kDouble || base.type == at::kDouble, a,
                   " is float64, which only a float64 ", base.typed, " takes, but ", base.typed, " is ", base.type);
  const int64_t rank = lora_B.size(1);
  TORCH_CHECK_VALUE(rank > 0, b, " must be [out_features, rank] with rank > 0, but has shape ", lora_B.sizes());
  TORCH_CHECK_VALUE(lora_A.size(0) == groups * rank && lora_A.size(1) == base.in_features, a, " must be [",
                    groups * rank, ", ", base.in_features, "] for weight ", weight.sizes(), " and ", b, " ",
                    lora_B.sizes(), ", but has shape ", lora_A.sizes());
  TORCH_CHECK_VALUE(lora_B.size(0) == groups * (weight.size(0) / slices), b, " must be [",
                    groups * (weight.size(0) / slices), ", rank] for weight ", weight.sizes(), ", but has shape ",
                    lora_B.sizes());
}

void check_base(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), "x is ", x.scalar_type(), ", but weight is ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(x.device() == weight.device(), "x is on ", x.device(), ", but weight on ", weight.device());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == weight.size(1), "x must be [..., ", weight.size(1), "] for weight ",
                    weight.sizes(), ", but has shape ", x.sizes());
  if (!bias) return;
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [", weight.size(0),
                    "] for weight ", weight.sizes(), ", but has shape ", bias->sizes());
  TORCH_CHECK_TYPE(bias->scalar_type() == weight.scalar_type(), "bias is ", bias->scalar_type(), ", but weight is ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(bias->device() == weight.device(), "bias is on ", bias->device(), ", but weight on ",
                    weight.device());
}

void check_scaling(double scaling) {
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, but is ", scaling);
}

// The frozen layer, plain or quantized.
Base checked_base(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& weight_scale) {
  if (weight_scale) {
    check_quantized(x, weight, *weight_scale, bias);
    return Base(weight, x);
  }
  check_matrix({"weight"}, weight, weight);
  check_base(x, weight, bias);
  return Base(weight);
}

}  // namespace

c10::SmallVector<bool, 8> as_array(const c10::List<bool>& list) {
  c10::SmallVector<bool, 8> flags;
  for (const bool flag : list) flags.push_back(flag);
  return flags;
}

int64_t count_enabled(at::ArrayRef<bool> enable_lora) {
  return std::count(enable_lora.begin(), enable_lora.end(), true);
}

void check_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                const at::Tensor& lora_A, const at::Tensor& lora_B, at::ArrayRef<bool> enable_lora, double scaling,
                double dropout_p, const std::optional<at::Tensor>& seed,
                const std::optional<at::Tensor>& weight_scale) {
  const int64_t groups = count_enabled(enable_lora), slices = static_cast<int64_t>(enable_lora.size());
  TORCH_CHECK_VALUE(groups > 0, "enable_lora must enable a slice, but is ", enable_lora);
  TORCH_CHECK_VALUE(weight.dim() != 2 || weight.size(0) % slices == 0, "enable_lora has ", slices,
                    " slices, which do not divide weight's ", weight.dim() == 2 ? weight.size(0) : 0, " outputs");
  check_pair(checked_base(x, weight, bias, weight_scale), lora_A, lora_B, groups, slices);
  check_scaling(scaling);
  check_dropout(dropout_p, seed, x.device());
}

void check_multi_lora(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings, const at::Tensor& index,
                      at::ArrayRef<double> dropout_p, const std::optional<at::Tensor>& seed,
                      const std::optional<at::Tensor>& weight_scale) {
  const Base base = checked_base(x, weight, bias, weight_scale);
  const auto count = static_cast<int64_t>(lora_A.size());
  TORCH_CHECK_VALUE(lora_B.size() == lora_A.size(), "lora_B must have ", count, " tensors, as lora_A has, but has ",
                    lora_B.size());
  for (int64_t i = 0; i < count; ++i) {
    check_pair(base, lora_A[i], lora_B[i], 1, 1, i);
    TORCH_CHECK_TYPE(lora_A[i].scalar_type() == lora_A[0].scalar_type(),
                     "lora_A must have one dtype, but lora_A[0] is ", lora_A[0].scalar_type(), " and lora_A[", i, "] ",
                     lora_A[i].scalar_type());
  }
  TORCH_CHECK_TYPE(is_supported(scalings.scalar_type()),
                   "scalings must be float32, float64, bfloat16 or float16, but is ", scalings.scalar_type());
  TORCH_CHECK_VALUE(scalings.dim() == 1 && scalings.size(0) == count, "scalings must be [", count, "] for ", count,
                    " adapters, but has shape ", scalings.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64, but is ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() < x.dim() && index.sizes() == x.sizes().slice(0, index.dim()),
                    "index must have leading sizes of x, whose shape is ", x.sizes(), ", but has shape ",
                    index.sizes());
  TORCH_CHECK_VALUE(scalings.device() == x.device(), "scalings must be on ", x.device(), ", but is on ",
                    scalings.device());
  TORCH_CHECK_VALUE(index.device() == x.device(), "index must be on ", x.device(), ", but is on ", index.device());
  TORCH_CHECK_VALUE(dropout_p.empty() || dropout_p.size() == lora_A.size(), "dropout_p must be empty or have ", count,
                    " values, but has ", dropout_p.size());
  for (const double p : dropout_p) check_dropout(p, seed, x.device());
}

void check_lora_grad(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight) {
  check_saved("grad_y", grad_y, with_last_size(x.sizes(), weight.size(0)), x.scalar_type(), x.device());
}

void check_multi_lora_saved(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight,
                            at::TensorList lora_A, const c10::List<bool>& needs_A, const c10::List<bool>& needs_B) {
  check_lora_grad(grad_y, x, weight);
  TORCH_CHECK_VALUE(needs_A.size() == lora_A.size(), "needs_A must have ", lora_A.size(), " elements, but has ",
                    needs_A.size());
  TORCH_CHECK_VALUE(needs_B.size() == lora_A.size(), "needs_B must have ", lora_A.size(), " elements, but has ",
                    needs_B.size());
}

void check_lora_merge(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling) {
  check_matrix({"weight"}, weight, weight);
  check_pair(Base(weight), lora_A, lora_B);
  check_scaling(scaling);
  for (int64_t dim = 0; dim < 2; ++dim) {
    TORCH_CHECK_VALUE(weight.stride(dim) != 0 || weight.size(dim) <= 1,
                      "weight shares memory among its elements (strides ", weight.strides(), "): clone it first");
  }
}

void check_residual(const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& outliers) {
  TORCH_CHECK_TYPE(residual.scalar_type() == at::kChar, "residual must be int8, but is ", residual.scalar_type());
  TORCH_CHECK_VALUE(residual.sizes() == weight.sizes(), "residual must have weight's shape ", weight.sizes(),
                    ", but has shape ", residual.sizes());
  TORCH_CHECK_TYPE(outliers.scalar_type() == weight.scalar_type(), "outliers is ", outliers.scalar_type(),
                   ", but weight is ", weight.scalar_type());
  TORCH_CHECK_VALUE(outliers.dim() == 1, "outliers must have 1 dimension, but has shape ", outliers.sizes());
  TORCH_CHECK_VALUE(residual.device() == weight.device() && outliers.device() == weight.device(), "residual is on ",
                    residual.device(), " and outliers on ", outliers.device(), ", but weight on ", weight.device());
}

}  // namespace peft_ext
