"""The public functions of the native ops, one file per op, named as the op.

Each calls the compiled op where there is a kernel for the tensors' device, and the reference
(:mod:`peft_ext.reference`) elsewhere.
"""

from peft_ext.ops.adapter_fusion import adapter_fusion
from peft_ext.ops.bottleneck_adapter import bottleneck_adapter
from peft_ext.ops.kron_linear import kron_linear
from peft_ext.ops.lora_linear import lora_linear
from peft_ext.ops.lora_merge_ import lora_merge_
from peft_ext.ops.lora_unmerge_ import lora_unmerge_
from peft_ext.ops.merged_lora_linear import merged_lora_linear
from peft_ext.ops.multi_lora_linear import multi_lora_linear
from peft_ext.ops.prefix_attention import prefix_attention
from peft_ext.ops.quantized_linear import quantized_linear

__all__ = [
    "adapter_fusion",
    "bottleneck_adapter",
    "kron_linear",
    "lora_linear",
    "lora_merge_",
    "lora_unmerge_",
    "merged_lora_linear",
    "multi_lora_linear",
    "prefix_attention",
    "quantized_linear",
]
