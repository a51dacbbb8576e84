"""Prefix tuning (Li & Liang, 2021): trained keys and values that every query of every layer sees.

Without the reparametrisation this is P-tuning v2 (Liu et al., 2021).
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.ops.prefix_attention import prefix_attention
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType
from peft_ext.tuners.layer import Entry, Part, TunerLayer, adapter_dtype
from peft_ext.tuners.mixed import Mix, by_adapter, check_per_row, current_mix
from peft_ext.tuners.prompt_learning import PromptLearningConfig, check_length
from peft_ext.tuners.state_dict import PROMPT_ENCODER

IMPLEMENTATION = "peft_ext_prefix"
"""The name under which transformers' registry of attention functions has ours."""

_ENCODERS = ("bert", "roberta", "xlm-roberta")
ATTENTION: dict[str, str] = {
    **dict.fromkeys(_ENCODERS, r".*\.attention\.self"),
    "gpt2": r".*\.attn",
    **dict.fromkeys(("llama", "mistral", "qwen2"), r".*\.self_attn"),
}
"""Full names of the attention modules by a transformers configuration's ``model_type``."""
_POSITIONS = ("wpe", "rotary_emb")
"""Last names of the modules of decoders that are called with position ids."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values ``[tokens, heads, head_dim]`` of one layer."""


class MixedPrefix(NamedTuple):
    """The prefixes of a mixed batch, by adapter."""

    mix: Mix
    prefixes: dict[str, Prefix]


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning, and of P-tuning v2, which is prefix tuning without a projection.

    Fields, defaults and meaning are Hugging Face PEFT's, but for ``gated``.

    ``token_dim``, the features of one layer's keys, ``num_attention_heads``, the number of key heads, and
    ``num_layers`` follow from the model.

    Args:
        encoder_hidden_size: hidden features of the reparametrisation; ``token_dim`` by default.
        prefix_projection: train the prefix as the output of an MLP. The plain prefix is saved, as Hugging Face PEFT
            does, and the MLP beside it, so that training can resume; for inference the plain prefix is loaded.
        init_weights: None for a normal distribution, "zero" for zeros.
        gated: scale the keys and values of each virtual token in each layer by a learned gate max(g, 0), which
            starts open at 1 (as Adaptive Prefix Tuning, Zhang et al., 2023). A token whose gate is closed is left out
            of the layer, and stays so, as it gets no gradient: with all closed the model is the base model. The
            checkpoint has the gates beside the prefix. Not Hugging Face PEFT's; while no gate is closed it reads
            the checkpoint rightly.

    Raises:
        TypeError: for a ``gated`` that is no bool.
        ValueError: for a number of tokens below 1, an unknown ``init_weights``, or ``gated`` with a projection.

    Example:
        >>> from peft_ext import PrefixTuningConfig
        >>> PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=8, gated=True).peft_type
        <PeftType.PREFIX_TUNING: 'PREFIX_TUNING'>
    """

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.encoder_hidden_size is not None:
            check_sizes({"encoder_hidden_size": self.encoder_hidden_size})
        if not isinstance(self.prefix_projection, bool):
            raise TypeError(f"prefix_projection must be a bool, got {self.prefix_projection!r}")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")
        if self.gated and self.prefix_projection:
            raise ValueError("gated needs prefix_projection=False: gates belong to the plain prefix")


class PrefixEncoder(nn.Module):
    """One adapter's prefix of all layers.

    ``embedding`` is [tokens, layers * 2 * token_dim]: the keys of layer l at 2l, its values at 2l + 1.
    """

    def __init__(self, config: PrefixTuningConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.num_virtual_tokens and config.num_layers and config.token_dim and config.num_attention_heads
        self.num_virtual_tokens = config.num_virtual_tokens
        self.heads = config.num_attention_heads
        self.layers = config.num_layers
        shape = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
        self.embedding = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        if config.init_weights == "zero":
            nn.init.zeros_(self.embedding)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values ``[tokens, heads, head_dim]``, views of the embedding."""
        return self._split(self.embedding.unflatten(1, (self.layers, -1))[:, layer])

    def open_tokens(self) -> int:
        """How many virtual tokens there are in any layer."""
        return self.num_virtual_tokens

    def _split(self, layer: Tensor) -> tuple[Tensor, Tensor]:
        key, value = layer.unflatten(1, (2, self.heads, -1)).unbind(1)
        return key, value


class ProjectedPrefixEncoder(PrefixEncoder):
    """The prefix as the output of an MLP: embedding -> Linear -> Tanh -> Linear.

    The last linear layer is split into one for each layer of the model, which so computes its own part only.
    """

    def __init__(self, config: PrefixTuningConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        assert config.num_virtual_tokens and config.token_dim and config.encoder_hidden_size
        width, hidden = config.token_dim, config.encoder_hidden_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width, **options))
        self.hidden = nn.Sequential(nn.Linear(width, hidden, **options), nn.Tanh())
        self.outputs = nn.ModuleList(nn.Linear(hidden, 2 * width, **options) for _ in range(self.layers))
        if config.init_weights == "zero":
            for parameter in self.outputs.parameters():
                nn.init.zeros_(parameter)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._split(self.outputs[layer](self.hidden(self.embedding)))

    @torch.no_grad()
    def prompt_embeddings(self) -> Tensor:
        """The plain prefix that this makes."""
        hidden = self.hidden(self.embedding)
        return torch.cat([output(hidden) for output in self.outputs], dim=1)


class GatedPrefixEncoder(PrefixEncoder):
    """A prefix in which ``gate``, [tokens, layers], scales each token in each layer, or leaves it out."""

    def __init__(self, config: PrefixTuningConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, device, dtype)
        self.gate = nn.Parameter(torch.ones(self.num_virtual_tokens, self.layers, device=device, dtype=dtype))

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values ``[open tokens, heads, head_dim]``."""
        key, value = super().forward(layer)
        is_open = self.gate[:, layer] > 0
        gate = self.gate[is_open, layer].view(-1, 1, 1)
        return gate * key[is_open], gate * value[is_open]

    @torch.no_grad()
    def prompt_embeddings(self) -> Tensor:
        """The plain prefix that this makes; closed tokens are zeros."""
        layers = self.embedding.unflatten(1, (self.layers, -1))
        return (self.gate.relu().unsqueeze(2) * layers).flatten(1)

    def open_tokens(self) -> int:
        return int((self.gate > 0).any(dim=1).sum())


class PrefixSlot(TunerLayer):
    """What the layers of prefix tuning share. All of them hold the same encoder."""

    part_names = ("encoder",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.encoder = nn.ModuleDict()

    @property
    def active_encoder(self) -> PrefixEncoder | None:
        """The encoder at work, if any."""
        if self.disable_adapters or not self.active_adapters:
            return None
        encoder = self.encoder[self.active_adapters[0]]
        assert isinstance(encoder, PrefixEncoder)
        return encoder

    def check_active(self, adapter_names: list[str]) -> None:
        mine = [name for name in adapter_names if name in self]
        if len(mine) > 1:
            raise ValueError(f"adapters {mine} cannot be active together: attention has one prefix at a time")

    def checkpoint_key(self, name: str, key: str) -> str:
        """Checkpoints have the prefix of all layers under one key."""
        return key

    def entries(self, parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:  # type: ignore[override]
        """None: the first attention module has those of the encoder that all share."""
        return iter(())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("a prefix is no update of weights and cannot be merged: unload() removes it")

    def unmerge(self, keep: int = 0) -> None:
        """Nothing is ever merged."""


class PrefixAttention(PrefixSlot):
    """An attention module of transformers that also sees the active prefix.

    transformers finds the attention function by the name in the module's configuration, and hands it the
    keyword arguments that the module does not know. So the module gets a copy of its configuration that names our
    function, which passes calls without a prefix on to the model's own. Masks are made elsewhere, as the model's own
    implementation wants them, and ours takes all of them.
    """

    def __init__(self, base_layer: nn.Module, layer: int) -> None:
        super().__init__(base_layer)
        self.layer = layer
        own: Any = base_layer.config
        config = copy.copy(own)
        config._attn_implementation_internal = IMPLEMENTATION
        config.own = own
        self.base_layer.config = config

    def release(self) -> None:
        self.base_layer.config = self.base_layer.config.own

    def entries(self, parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:  # type: ignore[override]
        """The whole prefix, as inference needs it, and what it is computed from."""
        if self.layer > 0:
            return
        encoder = parts["encoder"]
        assert isinstance(encoder, PrefixEncoder)
        if not isinstance(encoder, ProjectedPrefixEncoder | GatedPrefixEncoder):
            yield Entry("prompt_embeddings", f"encoder.{adapter_name}.embedding", encoder.embedding)
            return
        yield Entry("prompt_embeddings", None, encoder.prompt_embeddings())
        for name, parameter in encoder.named_parameters():
            yield Entry(PROMPT_ENCODER + name, f"encoder.{adapter_name}.{name}", parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs, prefix=self._prefix())

    def _prefix(self) -> Prefix | MixedPrefix | None:
        mix = current_mix()
        if mix is None or self.disable_adapters:
            prefix = None if self.active_encoder is None else self.active_encoder(self.layer)
            return prefix if prefix is not None and len(prefix[0]) else None
        check_per_row(mix, "prefixes")
        names = self.mixed_names(mix)
        return MixedPrefix(mix, {name: self.encoder[name](self.layer) for name in names}) if names else None


class ShiftedPositions(PrefixSlot):
    """A decoder's position embedding: the sequence begins after the prefix, as in Hugging Face PEFT."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "position_ids" in kwargs:
            return self.base_layer(*args, **{**kwargs, "position_ids": self._shifted(kwargs["position_ids"])})
        *others, position_ids = args
        return self.base_layer(*others, self._shifted(position_ids), **kwargs)

    def _shifted(self, position_ids: Tensor) -> Tensor:
        mix = current_mix()
        if mix is None or self.disable_adapters:
            shift = 0 if self.active_encoder is None else self.active_encoder.open_tokens()
            self._check_length(shift, position_ids)
            return position_ids + shift if shift else position_ids
        names = self.mixed_names(mix)
        encoders: list[Any] = [self.encoder[name] for name in names]
        lengths = [*(encoder.open_tokens() for encoder in encoders), 0]  # -1, no prefix, counts from the end
        self._check_length(max(lengths), position_ids)
        # positions may be given once for all rows
        index = mix.index_among(names, position_ids if position_ids.size(0) > 1 else mix.index)
        device = position_ids.device
        return position_ids + torch.tensor(lengths, device=device)[index.to(device)].unsqueeze(1)

    def _check_length(self, shift: int, position_ids: Tensor) -> None:
        if shift and isinstance(self.base_layer, nn.Embedding):
            check_length(shift, position_ids.size(-1), self.base_layer.num_embeddings)


class PrefixTuningModel(BaseTuner[PrefixTuningConfig]):
    """A model with prefixes in its attention modules."""

    def resolve(self, config: PrefixTuningConfig) -> PrefixTuningConfig:
        config = copy.deepcopy(config)
        modules = self._attention_modules()
        base: Any = self.model.config
        heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        found = {"num_layers": len(modules), "num_attention_heads": heads, "token_dim": heads * head_dim}
        for name, value in found.items():
            if getattr(config, name) not in (None, value):
                raise ValueError(f"{name} is {getattr(config, name)}, but the model's is {value}")
            setattr(config, name, value)
        config.num_transformer_submodules = 1
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        return config

    def plan(self, adapter_name: str, config: PrefixTuningConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        _register_attention()
        modules = self._attention_modules()
        weight = next(modules[0][1].parameters())
        dtype = adapter_dtype(weight.dtype, autocast_adapter_dtype)
        # a projection is for training only
        projected = config.prefix_projection and not config.inference_mode
        kind = ProjectedPrefixEncoder if projected else GatedPrefixEncoder if config.gated else PrefixEncoder
        encoder = kind(config, weight.device, dtype)

        def place(name: str, module: nn.Module, wrap: Any) -> Placement:
            return Placement(name, module, wrap, lambda slot: slot.attach(adapter_name, {"encoder": encoder}))

        attention = [
            place(name, module, lambda base, layer=layer: PrefixAttention(base, layer))
            for layer, (name, module) in enumerate(modules)
        ]
        return attention + [place(name, module, ShiftedPositions) for name, module in self._position_modules()]

    def _attention_modules(self) -> list[tuple[str, nn.Module]]:
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        if model_type not in ATTENTION:
            raise ValueError(
                f"prefix tuning does not know the attention of {type(self.model).__name__} "
                f"(model_type {model_type!r}): it knows {', '.join(ATTENTION)}; "
                "put MHAWithPrefix into a model of your own"
            )
        return [(n, m) for n, m in self.model.named_modules() if re.fullmatch(ATTENTION[model_type], n)]

    def _position_modules(self) -> list[tuple[str, nn.Module]]:
        return [(n, m) for n, m in self.model.named_modules() if n.rpartition(".")[2] in _POSITIONS]


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    prefix: Prefix | MixedPrefix | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function: ``[batch, queries, heads, head_dim]``, and no weights."""
    if prefix is None:
        own = _own_attention(module)
        return own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        raise ValueError("prefix tuning needs the masks of attn_implementation 'sdpa' or 'eager': choose one of these")
    causal = module.is_causal if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.size(2) > 1
    if causal and key.size(2) > query.size(2):
        # the rest of an empty static cache, as in transformers' own function
        key, value = key[:, :, : query.size(2)], value[:, :, : query.size(2)]
    attend = partial(prefix_attention, is_causal=causal, scale=scaling, dropout_p=dropout)
    if isinstance(prefix, MixedPrefix):
        return _attend_mixed(attend, query, key, value, prefix, attention_mask).transpose(1, 2), None
    return attend(query, key, value, *prefix, attention_mask).transpose(1, 2), None


def _attend_mixed(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, prefix: MixedPrefix, mask: Tensor | None
) -> Tensor:
    """The rows of each prefix by themselves, since the op shares one over the batch."""
    nothing = key.new_empty(0, key.size(1), key.size(3)), value.new_empty(0, value.size(1), value.size(3))

    def run(name: str | None, rows: Tensor) -> Tensor:
        own_mask = mask if mask is None or mask.size(0) == 1 else mask[rows]
        own_prefix = nothing if name is None else prefix.prefixes[name]
        return attend(query[rows], key[rows], value[rows], *own_prefix, own_mask)

    return by_adapter(prefix.mix, list(prefix.prefixes), torch.arange(query.size(0), device=query.device), run)


def _own_attention(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the module would use without prefixes."""
    from transformers import AttentionInterface

    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    return AttentionInterface().get_interface(module.config.own._attn_implementation, eager)


CONFIG_CLASSES[PeftType.PREFIX_TUNING] = PrefixTuningConfig
TUNER_CLASSES[PeftType.PREFIX_TUNING] = PrefixTuningModel
