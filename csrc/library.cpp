// Every op schema of the project, in this one place. Kernels register themselves beside their code:
// csrc/autograd (derivatives), csrc/autocast.cpp, csrc/cpu, csrc/cuda; fakes in peft_ext/_fake.py.
#include <torch/library.h>

TORCH_LIBRARY(peft_ext, m) {
  // With weight_scale, the weight of an op is as that of quantized_linear.
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "float scaling=1.0, float dropout_p=0.0, Tensor? seed=None, Tensor? weight_scale=None) -> Tensor");
  // Returns the gradients that `needs` (x, bias, lora_A, lora_B) asks for, in that order.
  m.def(
      "lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "float scaling, float dropout_p, Tensor? seed, bool[4] needs, Tensor? weight_scale=None) -> Tensor[]");

  m.def(
      "merged_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "bool[] enable_lora, float scaling=1.0, float dropout_p=0.0, Tensor? seed=None, Tensor? weight_scale=None) "
      "-> Tensor");
  m.def(
      "merged_lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "bool[] enable_lora, float scaling, float dropout_p, Tensor? seed, bool[4] needs, Tensor? weight_scale=None) "
      "-> Tensor[]");

  // One A and B of each adapter. index names the adapter of each row, or of each group of rows of x; -1 for none.
  m.def(
      "multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_A, Tensor[] lora_B, Tensor scalings, "
      "Tensor index, float[] dropout_p=[], Tensor? seed=None, Tensor? weight_scale=None) -> Tensor");
  // Returns the gradients of x and bias, if needed, of the A that `needs_A` names, and of the B that `needs_B` names.
  m.def(
      "multi_lora_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, "
      "Tensor scalings, Tensor index, float[] dropout_p, Tensor? seed, bool needs_x, bool needs_bias, "
      "bool[] needs_A, bool[] needs_B, Tensor? weight_scale=None) -> Tensor[]");

  m.def(
      "lora_merge_(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling=1.0) "
      "-> (Tensor residual, Tensor outliers)");
  m.def(
      "lora_unmerge_(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, Tensor residual, Tensor outliers, "
      "float scaling=1.0) -> ()");

  // hidden is what the activation takes, kept for the backward; empty without keep_hidden.
  m.def(
      "bottleneck_adapter(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, str activation='relu', str norm='none', "
      "bool residual=True, float scaling=1.0, float eps=1e-05, bool keep_hidden=False) "
      "-> (Tensor y, Tensor hidden)");
  // Returns the gradients that `needs` (the tensors of bottleneck_adapter in their order) asks for.
  m.def(
      "bottleneck_adapter_backward(Tensor grad_y, Tensor x, Tensor hidden, Tensor down_weight, Tensor? down_bias, "
      "Tensor up_weight, Tensor? up_bias, Tensor? norm_weight, Tensor? norm_bias, str activation, str norm, "
      "bool residual, float scaling, float eps, bool[7] needs) -> Tensor[]");
  // folded_query is query key_weight, kept for the backward; empty without key_weight.
  m.def(
      "adapter_fusion(Tensor query, Tensor[] outputs, Tensor? key_weight=None, Tensor? key_bias=None, "
      "float scale=1.0) -> (Tensor mix, Tensor weights, Tensor folded_query)");
  // Returns the gradients of the folded query, if needed, and of the outputs that `needs_outputs` names.
  m.def(
      "adapter_fusion_backward(Tensor? grad_mix, Tensor? grad_weights, Tensor folded_query, Tensor[] outputs, "
      "Tensor weights, float scale, bool needs_query, bool[] needs_outputs) -> Tensor[]");
  // B [n, b_in, b_out], or with t [n, rank, b_out] its left factor s [n, b_in, rank].
  m.def("kron_linear(Tensor x, Tensor A, Tensor B, Tensor? t=None, Tensor? bias=None, float scaling=1.0) -> Tensor");
  // Returns the gradients that `needs` (x, A, B, t, bias) asks for, in that order.
  m.def(
      "kron_linear_backward(Tensor grad_y, Tensor x, Tensor A, Tensor B, Tensor? t, float scaling, bool[5] needs) "
      "-> Tensor[]");
  // Also returns the log-sum-exp of every query's scores, which the backward starts from.
  m.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_key, Tensor prefix_value, "
      "Tensor? attn_mask=None, bool is_causal=False, float scale=1.0, float dropout_p=0.0, Tensor? seed=None) "
      "-> (Tensor out, Tensor lse)");
  // Returns the gradients that `needs` (q, k, v, prefix_key, prefix_value) asks for, in that order.
  m.def(
      "prefix_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor prefix_key, "
      "Tensor prefix_value, Tensor? attn_mask, Tensor out, Tensor lse, bool is_causal, float scale, "
      "float dropout_p, Tensor? seed, bool[5] needs) -> Tensor[]");
  // weight int8 [out, in], or uint8 [out, in / 2] of 4-bit values; weight_scale [out, groups].
  m.def("quantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor");
  // Returns the gradient of x.
  m.def("quantized_linear_backward(Tensor grad_y, Tensor weight, Tensor weight_scale) -> Tensor");
}
