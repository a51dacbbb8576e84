"""Parameter-efficient fine-tuning for PyTorch whose every method runs on a native op."""

from peft_ext import models as models
from peft_ext import nn as nn
from peft_ext import ops as ops
from peft_ext import reference as reference
from peft_ext import serialization as serialization
from peft_ext import tuners as tuners
from peft_ext._version import __version__
from peft_ext.nn import (
    Adapter,
    HoulsbyAdapter,
    AdapterFusion,
    AttentionFusion,
    LoRA_MHA,
    LoRALinear,
    MergedLoRALinear,
    SimpleAdapter,
    freeze_except,
    fusion_weights,
    print_trainable_parameters,
    trainable_parameters,
)
from peft_ext.tuners import (
    AdapterDrop,
    HoulsbyConfig,
    HoulsbyModel,
    BitFitConfig,
    BitFitModel,
    LoraConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
    PfeifferConfig,
    PfeifferModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

# Without the subpackages: `from peft_ext import *` must not replace torch's nn.
__all__ = [
    "Adapter",
    "AdapterDrop",
    "HoulsbyAdapter",
    "HoulsbyConfig",
    "HoulsbyModel",
    "AdapterFusion",
    "AttentionFusion",
    "BitFitConfig",
    "BitFitModel",
    "LoRALinear",
    "LoRA_MHA",
    "LoraConfig",
    "LoraModel",
    "MergedLoRALinear",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PfeifferConfig",
    "PfeifferModel",
    "SimpleAdapter",
    "TaskType",
    "__version__",
    "freeze_except",
    "fusion_weights",
    "get_peft_model",
    "get_peft_model_state_dict",
    "print_trainable_parameters",
    "set_peft_model_state_dict",
    "trainable_parameters",
]
