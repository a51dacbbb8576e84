"""Plain-PyTorch oracles: one file per op, named as the op.

Tests compare the native ops with these, and they are what runs where there is no native build.
They favour obviousness over speed, differentiate through ordinary autograd, and import nothing
else of the package.
"""

from peft_ext.reference.adapter_fusion import adapter_fusion
from peft_ext.reference.bottleneck_adapter import bottleneck_adapter
from peft_ext.reference.kron_linear import kron_linear
from peft_ext.reference.lora_linear import lora_linear
from peft_ext.reference.lora_merge_ import lora_merge_
from peft_ext.reference.lora_unmerge_ import lora_unmerge_
from peft_ext.reference.merged_lora_linear import merged_lora_linear
from peft_ext.reference.multi_lora_linear import multi_lora_linear
from peft_ext.reference.prefix_attention import prefix_attention
from peft_ext.reference.quantized_linear import quantized_linear

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
