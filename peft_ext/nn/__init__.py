"""Drop-in modules for one's own ``nn.Module``, and helpers to choose what trains."""

from peft_ext.nn.adapter import Adapter, HoulsbyAdapter, SimpleAdapter
from peft_ext.nn.attention import SelfAttention
from peft_ext.nn.compacter import CompacterAdapter, EfficientCompacterAdapter
from peft_ext.nn.fusion import AdapterFusion, AttentionFusion, fusion_weights
from peft_ext.nn.kron import KronLinear
from peft_ext.nn.lora import LoRA_MHA, LoRALinear, MergedLoRALinear
from peft_ext.nn.prefix import MHAWithPrefix, PrefixTuning
from peft_ext.nn.prompt import PromptEncoder, PromptTuningClassifier
from peft_ext.nn.quantized import QuantizedLinear, dequantize_weight, quantize_weight
from peft_ext.nn.side import SideMLP, SideNetwork, first_layers
from peft_ext.nn.trainable import freeze_except, print_trainable_parameters, trainable_parameters

__all__ = [
    "Adapter",
    "AdapterFusion",
    "AttentionFusion",
    "CompacterAdapter",
    "EfficientCompacterAdapter",
    "HoulsbyAdapter",
    "KronLinear",
    "LoRALinear",
    "LoRA_MHA",
    "MHAWithPrefix",
    "MergedLoRALinear",
    "PrefixTuning",
    "PromptEncoder",
    "PromptTuningClassifier",
    "QuantizedLinear",
    "SelfAttention",
    "SideMLP",
    "SideNetwork",
    "SimpleAdapter",
    "dequantize_weight",
    "first_layers",
    "freeze_except",
    "fusion_weights",
    "print_trainable_parameters",
    "quantize_weight",
    "trainable_parameters",
]
