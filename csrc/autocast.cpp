// Autocast, where F.linear would cast: x and the frozen layer to the autocast dtype. The adapters keep theirs:
// the ops take float32 adapters on a bfloat16 base, so the small trained matrices lose nothing.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/find_op.h"
#include "common/no_autocast.h"

namespace peft_ext {
namespace {

template <c10::DeviceType kDevice>
struct Autocast {
  using OptionalTensor = std::optional<at::Tensor>;

  static at::Tensor cast(const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), tensor, kDevice);
  }

  static OptionalTensor cast(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(cast(*tensor)) : std::nullopt;
  }

  static at::Tensor cast_half(const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat ? tensor : cast(tensor);
  }

  // The whole mix in the autocast dtype, as its matrix products would be; its softmax is float32 in any case.
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> adapter_fusion(const at::Tensor& query, at::TensorList outputs,
                                                                       const OptionalTensor& key_weight,
                                                                       const OptionalTensor& key_bias, double scale) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(adapter_fusion)>("peft_ext::adapter_fusion");
    std::vector<at::Tensor> cast_outputs;
    cast_outputs.reserve(outputs.size());
    for (const auto& output : outputs) cast_outputs.push_back(cast(output));
    return op.call(cast(query), cast_outputs, cast(key_weight), cast(key_bias), scale);
  }

  static at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling, double dropout_p,
                                const OptionalTensor& seed, const OptionalTensor& weight_scale) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(lora_linear)>("peft_ext::lora_linear");
    return op.call(cast(x), weight_scale ? weight : cast(weight), cast(bias), lora_A, lora_B, scaling, dropout_p, seed,
                   weight_scale);
  }

  static at::Tensor merged_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const at::Tensor& lora_A, const at::Tensor& lora_B,
                                       const c10::List<bool>& enable_lora, double scaling, double dropout_p,
                                       const OptionalTensor& seed, const OptionalTensor& weight_scale) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(merged_lora_linear)>("peft_ext::merged_lora_linear");
    return op.call(cast(x), weight_scale ? weight : cast(weight), cast(bias), lora_A, lora_B, enable_lora, scaling,
                   dropout_p, seed, weight_scale);
  }

  static at::Tensor multi_lora_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                      at::TensorList lora_A, at::TensorList lora_B, const at::Tensor& scalings,
                                      const at::Tensor& index, at::ArrayRef<double> dropout_p,
                                      const OptionalTensor& seed, const OptionalTensor& weight_scale) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(multi_lora_linear)>("peft_ext::multi_lora_linear");
    return op.call(cast(x), weight_scale ? weight : cast(weight), cast(bias), lora_A, lora_B, scalings, index,
                   dropout_p, seed, weight_scale);
  }

  static at::Tensor kron_linear(const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& t,
                                const OptionalTensor& bias, double scaling) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(kron_linear)>("peft_ext::kron_linear");
    return op.call(cast(x), A, B, t, bias, scaling);
  }

  // As scaled_dot_product_attention. A float32 prefix or mask keeps its type; another goes the way of q.
  static std::tuple<at::Tensor, at::Tensor> prefix_attention(const at::Tensor& q, const at::Tensor& k,
                                                             const at::Tensor& v, const at::Tensor& prefix_key,
                                                             const at::Tensor& prefix_value,
                                                             const OptionalTensor& attn_mask, bool is_causal,
                                                             double scale, double dropout_p,
                                                             const OptionalTensor& seed) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(prefix_attention)>("peft_ext::prefix_attention");
    const OptionalTensor mask = attn_mask ? OptionalTensor(cast_half(*attn_mask)) : std::nullopt;
    return op.call(cast(q), cast(k), cast(v), cast_half(prefix_key), cast_half(prefix_value), mask, is_causal, scale,
                   dropout_p, seed);
  }

  static at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                     const OptionalTensor& bias) {
    const NoAutocast guard;
    static const auto op = find_op<decltype(quantized_linear)>("peft_ext::quantized_linear");
    return op.call(cast(x), weight, weight_scale, cast(bias));
  }
};

// The backwards, and what autocast leaves alone: without it inside too, so that products of at:: keep their types.
void without_autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const NoAutocast guard;
  op.callBoxed(stack);
}

template <c10::DeviceType kDevice>
void register_ops(torch::Library& m) {
  m.impl("adapter_fusion", Autocast<kDevice>::adapter_fusion);
  m.impl("lora_linear", Autocast<kDevice>::lora_linear);
  m.impl("merged_lora_linear", Autocast<kDevice>::merged_lora_linear);
  m.impl("multi_lora_linear", Autocast<kDevice>::multi_lora_linear);
  m.impl("kron_linear", Autocast<kDevice>::kron_linear);
  m.impl("prefix_attention", Autocast<kDevice>::prefix_attention);
  m.impl("quantized_linear", Autocast<kDevice>::quantized_linear);
  for (const char* name :
       {"adapter_fusion_backward", "bottleneck_adapter", "bottleneck_adapter_backward", "kron_linear_backward",
        "lora_linear_backward", "lora_merge_", "lora_unmerge_", "merged_lora_linear_backward",
        "multi_lora_linear_backward", "prefix_attention_backward", "quantized_linear_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_autocast>());
  }
}

TORCH_LIBRARY_IMPL(peft_ext, AutocastCPU, m) {
  register_ops<c10::DeviceType::CPU>(m);
}

TORCH_LIBRARY_IMPL(peft_ext, AutocastCUDA, m) {
  register_ops<c10::DeviceType::CUDA>(m);
}

}  // namespace
}  // namespace peft_ext
