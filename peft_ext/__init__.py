"""Parameter-efficient fine-tuning for PyTorch whose every method runs on a native op."""

from peft_ext import models, nn, ops, reference
from peft_ext._version import __version__
from peft_ext.nn import (
    LoRA_MHA,
    LoRALinear,
    MergedLoRALinear,
    freeze_except,
    print_trainable_parameters,
    trainable_parameters,
)

__all__ = [
    "LoRALinear",
    "LoRA_MHA",
    "MergedLoRALinear",
    "__version__",
    "freeze_except",
    "models",
    "nn",
    "ops",
    "print_trainable_parameters",
    "reference",
    "trainable_parameters",
]
