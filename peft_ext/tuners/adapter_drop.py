"""AdapterDrop (Rücklé et al., arXiv:2010.11918): the first layers of a model do without their adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peft_ext.nn._checks import check_sizes


@dataclass
class AdapterDrop:
    """Which layers go without an adapter.

    Args:
        mode: "specialised": the first ``layers`` layers have no adapter, in training and after it.
            "robust": every training step leaves out the adapters of the first n layers, n drawn
            uniformly from 0 to ``layers`` by torch's generator; ``drop_adapter_layers`` of the
            adapted model chooses n for inference. With gradient checkpointing every forward needs its
            backward before the next forward, because layers are computed again with the latest n: with
            two forwards torch raises a CheckpointError, or with ``use_reentrant=True`` gradients are wrong.
        layers: fewer than the model has adapted layers. None: "robust" may drop all but the last.

    Raises:
        ValueError: for another mode, a number that is not positive, or no number in mode "specialised".

    Example:
        >>> from peft_ext import AdapterDrop, HoulsbyConfig
        >>> HoulsbyConfig(adapter_drop=AdapterDrop("specialised", 5)).adapter_drop.layers
        5
    """

    mode: str = "robust"
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("specialised", "robust"):
            raise ValueError(f"mode must be 'specialised' or 'robust', got {self.mode!r}")
        if self.layers is None and self.mode == "specialised":
            raise ValueError("layers must be given with mode 'specialised'")
        if self.layers is not None:
            check_sizes({"layers": self.layers})

    def check(self, total: int) -> None:
        """Raises a ValueError unless some of ``total`` adapted layers are left."""
        if self.layers is not None and self.layers >= total:
            raise ValueError(
                f"adapter_drop.layers is {self.layers}, but the model has {total} layers with adapters: "
                f"at most {total - 1} can be dropped"
            )


class DropState:
    """Up to which layer adapters are left out now; shared by all layers of a model.

    ``chosen`` and ``drawn`` are the index of the first layer whose adapters work.
    """

    def __init__(self) -> None:
        self.chosen: float = 0
        self.drawn: float = 0

    def choose(self, dropped: int, layers: Sequence[int]) -> None:
        """For inference, and for training where nothing is drawn: leaves out the first of ``layers``."""
        self.chosen = self.drawn = [*layers, math.inf][dropped]

    def draw(self, most: int, layers: Sequence[int]) -> None:
        """For one training step: leaves out a random number of the first of ``layers``."""
        self.drawn = layers[int(torch.randint(most + 1, ()))]
