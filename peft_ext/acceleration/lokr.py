"""Hugging Face PEFT's LoKr layers on ``kron_linear``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lokr
from torch import Tensor

from peft_ext.acceleration.layers import FLOATS, LAYERS, TUNERS, AcceleratingTuner, Reasons, Replacement
from peft_ext.tuners.lokr import first_factor, lokr_update


def adapter_reason(layer: Any, name: str) -> str | None:
    """Why a layer runs PEFT's forward for one of its adapters; None if the op computes what PEFT does."""
    dtypes = [factor.dtype for factor in _parts(layer, name).values()]
    if len(set(dtypes)) > 1 or dtypes[0] not in FLOATS:
        return f"its factors are {', '.join(map(str, dtypes))}"
    return None


def _parts(layer: Any, name: str) -> dict[str, Tensor]:
    return {part: getattr(layer, part)[name] for part in layer.adapter_layer_names if name in getattr(layer, part)}


def layer_reasons(layer: Any, adapters: Iterable[str]) -> Reasons:
    """Everything that runs PEFT's forward."""
    reasons = {adapter: adapter_reason(layer, adapter) for adapter in adapters}
    return {adapter: reason for adapter, reason in reasons.items() if reason is not None}


class Linear(lokr.Linear):
    """PEFT's LoKr around ``nn.Linear``, which never forms the Kronecker product unless that is cheaper.

    PEFT's forward calls the base layer and adds this, so that the base layer may be any.
    """

    def _get_delta_activations(  # type: ignore[override]  # PEFT itself renames the input
        self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        parts = _parts(self, adapter_name)
        w1 = first_factor(parts)
        x = self._cast_input_dtype(input, w1.dtype)
        if x.dtype != w1.dtype or adapter_reason(self, adapter_name) is not None:
            return super()._get_delta_activations(adapter_name, input, *args, **kwargs)
        update = lokr_update(x, w1, parts, self.scaling[adapter_name])
        kept = self._kept_rows(adapter_name, update.size(-1))
        return update if kept is None else update * kept.to(update)

    def _kept_rows(self, adapter_name: str, count: int) -> Tensor | None:
        """What rank dropout leaves of each output, drawn as PEFT does; None where nothing is dropped."""
        p = self.rank_dropout[adapter_name]
        if not (self.training and p):
            return None
        kept = (torch.rand(count) > p).float()
        return kept / kept.mean() if self.rank_dropout_scale[adapter_name] else kept


class LoKrModel(AcceleratingTuner, lokr.LoKrModel):
    """PEFT's, which accelerates the layers that it makes."""


LAYERS[lokr.Linear] = Replacement(Linear, "kron_linear", layer_reasons)
TUNERS[lokr.LoKrModel] = LoKrModel
