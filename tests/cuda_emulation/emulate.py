"""A pytest plugin: the ops of ``$PEFT_EXT_EMULATED_CUDA`` take the place of the CPU's."""

from __future__ import annotations

import os

import torch

import peft_ext  # noqa: F401 - the ops that are replaced

torch.ops.load_library(os.environ["PEFT_EXT_EMULATED_CUDA"])
