"""The reference GPT of the examples and tests."""

from peft_ext.models.minigpt import GPTBlock, MiniGPT

__all__ = ["GPTBlock", "MiniGPT"]
