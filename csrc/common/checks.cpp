#include "common/checks.h"

namespace peft_ext {

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

std::vector<int64_t> with_last_size(at::IntArrayRef sizes, int64_t last) {
  auto result = sizes.vec();
  result.back() = last;
  return result;
}

void check_saved(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
                 at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", sizes, ", but has shape ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", but is ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on ", device, ", but is on ", tensor.device());
}

void check_dropout(double dropout_p, const std::optional<at::Tensor>& seed, at::Device device) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0, "dropout_p must be in [0, 1], but is ", dropout_p);
  if (dropout_p == 0.0) return;
  TORCH_CHECK_VALUE(seed.has_value(), "seed must be given with dropout_p = ", dropout_p);
  TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "seed must be int64, but is ", seed->scalar_type());
  TORCH_CHECK_VALUE(seed->numel() == 1 && seed->device() == device, "seed must have 1 element on ", device,
                    ", but has shape ", seed->sizes(), " on ", seed->device());
}

}  // namespace peft_ext
