"""Parameter-efficient fine-tuning for PyTorch whose every method runs on a native op."""

from peft_ext import ops, reference

__all__ = ["ops", "reference"]
