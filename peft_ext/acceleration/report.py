"""What ``accelerate`` did, and what it left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

_SHOWN = 3


@dataclass(frozen=True)
class Acceleration:
    """Which layers of a model run on our ops, and which do not, with the reason.

    Args:
        layers: full names of the layers that run on our ops, and the op.
        left: full names of the layers of Hugging Face PEFT that run as they did before, and why. Where one adapter of
            a layer is served and another is not, the other is named in brackets: ``"encoder.query [second]"``.

    Example:
        >>> Acceleration({"0": "lora_linear", "2": "lora_linear"}, {"4": "there is no op for a Conv2d"})
        Acceleration: 2 layers on lora_linear, 1 left
          left: there is no op for a Conv2d (4)
    """

    layers: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "\n".join([self._summary(), *self._reasons()])

    def _summary(self) -> str:
        ops = [f"{len(names)} layers on {op}" for op, names in _grouped(self.layers).items()]
        return f"Acceleration: {', '.join(ops) or 'nothing on our ops'}, {len(self.left)} left"

    def _reasons(self) -> Iterator[str]:
        for reason, names in _grouped(self.left).items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"  left: {reason} ({', '.join(names[:_SHOWN])}{more})"


def _grouped(values: dict[str, str]) -> dict[str, list[str]]:
    """The names for each value."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups
