"""What training costs: time of a step, memory above the loaded model."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in, in bytes


class StepTimes(TrainerCallback):
    """Times every training step: forward, backward and optimizer, without evaluation and logging.

    Args:
        clock: seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self.start)

    @property
    def median(self) -> float | None:
        """The usual step; None if there was none, as in a run that had only its end left to do."""
        return median(self.seconds) if self.seconds else None

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return self.clock()


class PeakMemory:
    """By how much the peak of memory in use has risen since a base model was loaded, in bytes.

    On the CPU it is the peak of the process's resident set, so that a run needs a process of its
    own. On an accelerator: the highest allocation there less the model's size.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on_accelerator = torch.accelerator.is_available()
        for parameter in model.parameters():
            parameter.sum()  # weights are mapped from their file, and resident only once they were read
        self.loaded = _size(model) if self.on_accelerator else _peak(on_accelerator=False)

    def above(self) -> int:
        return _peak(self.on_accelerator) - self.loaded


def _size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _peak(on_accelerator: bool) -> int:
    if on_accelerator:
        return torch.accelerator.max_memory_allocated()
    status = Path("/proc/self/status")
    # on Linux getrusage would not do: a new process begins with the peak of the one that started it
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
