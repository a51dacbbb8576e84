"""Where in a transformer's layers an adapter on a sublayer's output goes.

A layer has two sublayers, attention and feed-forward network (FFN). Adapters of the Houlsby family work on
what a sublayer gives, before the residual is added; those of the Pfeiffer family on the sum, around the
layer norm that follows the FFN, or on the layer's output where there is no such norm (pre-norm models).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from peft_ext.models import MiniGPT
from peft_ext.tuners.config import TargetedConfig
from peft_ext.tuners.layer import AdapterSlot
from peft_ext.tuners.targets import resolve_target_modules


class Sublayers(NamedTuple):
    """Names within one architecture's layers.

    Args:
        layers: the list of layers.
        attention: the module whose output is what attention adds to the residual.
        ffn: likewise of the FFN.
        ffn_norm: the norm after the FFN's residual; "" stands for the layer itself, in pre-norm models.
    """

    layers: str
    attention: str
    ffn: str
    ffn_norm: str = ""


_MINIGPT = Sublayers("blocks", "attn.out_proj", "ffn.2", "ln2")
_BERT = Sublayers("layer", "attention.output.dropout", "output.dropout", "output.LayerNorm")
SUBLAYERS: dict[str, Sublayers] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    "distilbert": Sublayers("layer", "attention.out_lin", "ffn.dropout", "output_layer_norm"),
    "gpt2": Sublayers("h", "attn.resid_dropout", "mlp.dropout"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3"), Sublayers("layers", "self_attn.o_proj", "mlp.down_proj")
    ),
}
"""By a transformers configuration's ``model_type``."""


def resolve_sublayers(model: nn.Module, config: TargetedConfig, places: Collection[str]) -> set[str] | str:
    """The configuration's ``target_modules``; by default the full names of the architecture's ``places``.

    Args:
        model: the model to adapt.
        config: what the user chose; ``layers_to_transform`` selects among the default places.
        places: fields of :class:`Sublayers`, such as ``("attention", "ffn")``.

    Raises:
        ValueError: if there is neither a choice nor a default, or ``layers_to_transform`` leaves no layer.
    """
    if config.target_modules is not None:
        return resolve_target_modules(model, config)
    sublayers = find_sublayers(model)
    if sublayers is None:
        raise ValueError(
            f"target_modules must be given for this model ({type(model).__name__}): "
            "name the modules whose output the adapters take, such as each layer's last linear layer"
        )
    wanted = config.layers_to_transform
    chosen = None if wanted in (None, []) else {wanted} if isinstance(wanted, int) else set(wanted)
    found = {
        name
        for place in places
        for name in _named_places(model, sublayers.layers, getattr(sublayers, place))
        if chosen is None or layer_index(name) in chosen
    }
    if not found:
        raise ValueError(f"layers_to_transform={wanted} leaves none of the layers of this {type(model).__name__}")
    return found


def find_sublayers(model: nn.Module) -> Sublayers | None:
    """The names in a known architecture, or None."""
    if any(isinstance(module, MiniGPT) for module in model.modules()):
        return _MINIGPT
    return SUBLAYERS.get(getattr(getattr(model, "config", None), "model_type", ""))


def layer_index(name: str) -> int | None:
    """The layer that a module belongs to: the first number in its full name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def output_width(model: nn.Module, name: str, module: Any) -> int:
    """How many features a module's output has: its own attribute, or else the model's ``hidden_size``.

    Raises:
        ValueError: if neither is known.
    """
    for attribute in ("out_features", "nf"):  # nn.Linear, transformers' Conv1D
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"target module {name!r}, a {type(module).__name__}, does not tell the width of its output, and the model "
            "has no config.hidden_size: name a linear layer or a layer norm"
        )
    return width


def _named_places(model: nn.Module, layers: str, place: str) -> list[str]:
    """Full names of ``place`` in every layer, outside of other adapters' insides."""
    pattern = re.compile(rf"(?:.*\.)?{layers}\.\d+" + (rf"\.{re.escape(place)}" if place else ""))
    slots = tuple(f"{name}.base_layer." for name, module in model.named_modules() if isinstance(module, AdapterSlot))
    names = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    return [name for name in names if not name.startswith(slots)]
