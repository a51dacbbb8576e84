"""Where AdapterHub puts its modules in each architecture, and what a conversion tells of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from peft_ext.tuners.sublayers import SUBLAYERS

MERGED = "qkv"
ATTENTION = ("q", "k", "v")
_HIDDEN_SIZES = ("hidden_size", "n_embd", "dim", "d_model")
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")


class Layout(NamedTuple):
    """One architecture. Names of modules are relative to a layer.

    Args:
        base: what models with a head call the base model.
        layers: the base model's list of layers.
        attention, ffn: the modules that hold the adapters after the sublayers.
        attention_norm: the layer norm after attention; "" in pre-norm models.
        lora: LoRA's layers by AdapterHub's name of their place; ``qkv`` is one layer for all three.
        prefix: AdapterHub's name of the place of prefixes.
        shifts: whether Hugging Face PEFT moves the text's positions on by the prefix.
    """

    base: str
    layers: str
    attention: str
    ffn: str
    attention_norm: str
    lora: dict[str, str]
    prefix: str = "self_prefix"
    shifts: bool = False


_SELF = "attention.self"
_BERT = Layout(
    base="bert",
    layers="encoder.layer",
    attention="attention.output",
    ffn="output",
    attention_norm="attention.output.LayerNorm",
    lora={
        "q": f"{_SELF}.query",
        "k": f"{_SELF}.key",
        "v": f"{_SELF}.value",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
    },
)
_LLAMA = Layout(
    base="model",
    layers="layers",
    attention="attention_adapters",
    ffn="output_adapters",
    attention_norm="",
    lora={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "intermediate": "mlp.down_proj",
        "output": "mlp.up_proj",
    },
    shifts=True,
)
LAYOUTS: dict[str, Layout] = {
    "bert": _BERT,
    **dict.fromkeys(("roberta", "xlm-roberta"), _BERT._replace(base="roberta")),
    "electra": _BERT._replace(base="electra"),
    "distilbert": Layout(
        base="distilbert",
        layers="transformer.layer",
        attention="attention_adapters",
        ffn="output_adapters",
        attention_norm="sa_layer_norm",
        lora={
            "q": "attention.q_lin",
            "k": "attention.k_lin",
            "v": "attention.v_lin",
            "intermediate": "ffn.lin1",
            "output": "ffn.lin2",
        },
        prefix="self",
    ),
    "gpt2": Layout(
        base="transformer",
        layers="h",
        attention="attention_adapters",
        ffn="output_adapters",
        attention_norm="",
        lora={MERGED: "attn.c_attn", "intermediate": "mlp.c_fc", "output": "mlp.c_proj"},
        shifts=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
}
"""By a transformers configuration's ``model_type``."""


def find_layout(model_type: Any) -> Layout:
    """The architecture's layout; a ValueError that lists the known ones if there is none."""
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise ValueError(
            f"model_type is {model_type!r}, whose modules are not known: must be one of {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[model_type]


class Place(NamedTuple):
    """Where in a layer an adapter works.

    Args:
        sublayer: "attention" or "ffn".
        before: whether around the layer norm, on the sum with the residual, rather than on what the sublayer gives.
    """

    sublayer: str
    before: bool


def place_names(model_type: str) -> dict[Place, str | None]:
    """Our target module of each place, relative to a layer ("" is the layer); None where there is no such module."""
    layout, ours = LAYOUTS[model_type], SUBLAYERS[model_type]
    return {
        Place("attention", False): ours.attention,
        Place("ffn", False): ours.ffn,
        Place("attention", True): layout.attention_norm or None,
        Place("ffn", True): ours.ffn_norm,
    }


def target_pattern(layout: Layout, indices: list[int], modules: list[str]) -> str:
    """A ``target_modules`` that matches these modules of these layers, with or without a head on the model."""
    layers = rf"(?:.*\.)?{re.escape(layout.layers)}\.(?:{'|'.join(map(str, indices))})"
    if modules == [""]:
        return layers
    return rf"{layers}\.(?:{'|'.join(map(re.escape, modules))})"


@contextmanager
def fitting_shapes() -> Iterator[None]:
    """Turns torch's own errors about tensors that do not go together into a ValueError."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"the shapes of the weights do not fit each other: {error}") from error


@dataclass
class Report:
    """What a conversion did.

    Args:
        mapped: what went over, and as what.
        notes: what is lost or changed, without any effect on the outputs.
        problems: what changes outputs and has no counterpart.
    """

    mapped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises a ValueError that lists the problems, if there are any."""
        if self.problems:
            raise ValueError(f"the adapter cannot be converted: {'; '.join(self.problems)}")


class BaseModel(NamedTuple):
    """What AdapterHub's files say of the base model.

    Args:
        model_type, hidden_size, num_layers: from its configuration.
        model_class: its class, or that of the checkpoint which its body comes from.
        name: where it came from.
    """

    model_type: str
    hidden_size: int
    num_layers: int | None = None
    model_class: str | None = None
    name: str | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> BaseModel:
        """That of a transformers model; a ValueError for any other."""
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError(f"AdapterHub's format needs a transformers model, got {type(model).__name__}")
        return cls.of_config(config.to_dict() | {"architectures": [type(model).__name__]}, config.name_or_path or None)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str | None) -> BaseModel:
        """That of a model's ``config.json``; a ValueError for an architecture that is not known."""
        model_type = config.get("model_type")
        find_layout(model_type)
        hidden_size, num_layers = (_size(config, names) for names in (_HIDDEN_SIZES, _NUM_LAYERS))
        classes = config.get("architectures") or [None]
        return cls(str(model_type), hidden_size, num_layers, classes[0], name)


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    size = next((config[name] for name in names if name in config), None)
    if not isinstance(size, int):
        raise ValueError(f"the base model's configuration has no {' or '.join(names)}")
    return size
