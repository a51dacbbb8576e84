"""Pfeiffer adapters (Pfeiffer et al., arXiv:2005.00247), in the form of AdapterHub's ``SeqBnConfig``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_ext.nn import Adapter, SimpleAdapter
from peft_ext.tuners.adapter_drop import DropState
from peft_ext.tuners.base import TUNER_CLASSES
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType
from peft_ext.tuners.houlsby import init_normal
from peft_ext.tuners.mixed import Mix, add_by_adapter, current_mix
from peft_ext.tuners.sublayer_tuner import Site, SublayerConfig, SublayerSlot, SublayerTuner

_INIT_STD = 0.02


@dataclass
class PfeifferConfig(SublayerConfig):
    """Configuration of Pfeiffer adapters: one a layer, after the FFN.

    With s the sum of the FFN's output and its residual, the layer's output becomes
    LN(s + f(LN(s))) where a layer norm follows (BERT), and s + f(s) where none does (GPT-2, Llama),
    with f(x) = up(relu(down(x))). Arguments are those of :class:`SublayerConfig`; ``target_modules``
    names the layer norms, or the layers.

    Example:
        >>> from peft_ext import PfeifferConfig, get_peft_model
        >>> from peft_ext.models import MiniGPT
        >>> model = MiniGPT(100, 128, 32, n_layers=2, n_heads=4, method="none")
        >>> get_peft_model(model, PfeifferConfig()).get_nb_trainable_parameters()[0]
        4368
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PFEIFFER


class NormSlot(SublayerSlot):
    """A layer norm with adapters around it: LN(s + adapter(LN(s)))."""

    def forward(self, x: Tensor) -> Tensor:
        mix = current_mix()
        if mix is not None:
            return self.base_layer(self.adapt_mixed(x, mix))
        for adapter in self.working_adapters():
            x = x + adapter(self.base_layer(x))
        return self.base_layer(x)

    def adapt_mixed(self, output: Tensor, mix: Mix) -> Tensor:
        if self.is_dropped():
            return output
        update = lambda name, part: self.adapter[name](self.base_layer(part))  # noqa: E731
        return add_by_adapter(mix, self.mixed_names(mix), output, output, update)


class LayerSlot(SublayerSlot):
    """A layer with adapters on its output.

    A hook puts them there: transformers records hidden states by hooks on its own layers, which would not see what
    is added outside of them.
    """

    def __init__(self, base_layer: nn.Module, layer: int, drop: DropState) -> None:
        super().__init__(base_layer, layer, drop)
        self._hook = base_layer.register_forward_hook(self._adapt_output, prepend=True)

    def release(self) -> None:
        self._hook.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def _adapt_output(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        return self.adapt(output)


class PfeifferModel(SublayerTuner[PfeifferConfig]):
    """A model with Pfeiffer adapters in it."""

    places = ("ffn_norm",)

    @staticmethod
    def slot_class(base_layer: nn.Module) -> type[SublayerSlot]:
        return NormSlot if isinstance(base_layer, nn.LayerNorm) else LayerSlot

    def build(self, config: PfeifferConfig, site: Site) -> nn.Module:
        kind = Adapter if isinstance(site.base_layer, nn.LayerNorm) else SimpleAdapter
        inner, like = config.inner_width(site.width), site.like
        adapter = kind(site.width, inner, activation=config.non_linearity, device=like.device, dtype=like.dtype)
        init_normal(adapter, _INIT_STD)
        return adapter


CONFIG_CLASSES[PeftType.PFEIFFER] = PfeifferConfig
TUNER_CLASSES[PeftType.PFEIFFER] = PfeifferModel
