#include "common/bottleneck_checks.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/checks.h"

namespace peft_ext {
namespace {

constexpr std::array<c10::string_view, 5> kActivations = {"relu", "gelu", "gelu_new", "silu", "tanh"};
constexpr std::array<c10::string_view, 3> kNorms = {"none", "pre", "post"};

void check_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef wanted, const at::Tensor& x,
                  const at::Tensor& down_weight) {
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, " must be ", wanted, " for down_weight ", down_weight.sizes(),
                    ", but has shape ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == down_weight.scalar_type(), name, " is ", tensor.scalar_type(),
                   ", but down_weight is ", down_weight.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " is on ", tensor.device(), ", but x on ", x.device());
}

}  // namespace

Activation activation_of(c10::string_view name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new") return Activation::kGeluNew;
  return name == "silu" ? Activation::kSilu : Activation::kTanh;
}

void check_bottleneck(const at::Tensor& x, const BottleneckTensors& adapter, c10::string_view activation,
                      c10::string_view norm, double scaling, double eps) {
  const at::Tensor& down = adapter.down_weight;
  TORCH_CHECK_VALUE(std::find(kActivations.begin(), kActivations.end(), activation) != kActivations.end(),
                    "activation must be one of relu, gelu, gelu_new, silu, tanh, but is '", activation, "'");
  TORCH_CHECK_VALUE(std::find(kNorms.begin(), kNorms.end(), norm) != kNorms.end(),
                    "norm must be one of none, pre, post, but is '", norm, "'");
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), "x must be float32, float64, bfloat16 or float16, but is ",
                   x.scalar_type());
  TORCH_CHECK_TYPE(is_supported(down.scalar_type()),
                   "down_weight must be float32, float64, bfloat16 or float16, but is ", down.scalar_type());
  TORCH_CHECK_TYPE(down.scalar_type() != at::kDouble || x.scalar_type() == at::kDouble,
                   "down_weight is float64, which only a float64 x takes, but x is ", x.scalar_type());
  TORCH_CHECK_VALUE(down.dim() == 2 && down.size(0) > 0 && down.size(1) > 0,
                    "down_weight must be [bottleneck, features] with both > 0, but has shape ", down.sizes());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == down.size(1), "x must be [..., ", down.size(1), "] for down_weight ",
                    down.sizes(), ", but has shape ", x.sizes());
  const int64_t width = down.size(0), features = down.size(1);
  check_tensor("down_weight", down, {width, features}, x, down);
  check_tensor("up_weight", adapter.up_weight, {features, width}, x, down);
  if (adapter.down_bias) check_tensor("down_bias", *adapter.down_bias, {width}, x, down);
  if (adapter.up_bias) check_tensor("up_bias", *adapter.up_bias, {features}, x, down);
  const bool wanted = norm != "none";
  TORCH_CHECK_VALUE(adapter.norm_weight.has_value() == wanted && adapter.norm_bias.has_value() == wanted,
                    "norm_weight and norm_bias must be given with norm 'pre' or 'post' and only then, but norm is '",
                    norm, "'");
  if (wanted) {
    check_tensor("norm_weight", *adapter.norm_weight, {features}, x, down);
    check_tensor("norm_bias", *adapter.norm_bias, {features}, x, down);
  }
  TORCH_CHECK_VALUE(std::isfinite(scaling), "scaling must be finite, but is ", scaling);
  TORCH_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "eps must be finite and >= 0, but is ", eps);
}

void check_bottleneck_saved(const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& hidden, int64_t width) {
  check_saved("grad_y", grad_y, x.sizes(), x.scalar_type(), x.device());
  check_saved("hidden", hidden, with_last_size(x.sizes(), width), acc_type(x.scalar_type()), x.device());
}

}  // namespace peft_ext
