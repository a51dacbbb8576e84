"""What the methods share that put learned embeddings, virtual tokens, before the text's.

Such a prompt is part of the model's input. A hook on the model lengthens the inputs by the virtual
tokens: ``input_ids`` by ids that the vocabulary does not have, masks, positions and labels by what
belongs to them. The slot around the input embeddings then looks those ids up in the prompt. So the
model itself still sees token ids (from which classifiers find the last token that is no padding),
and whatever calls the model, such as ``generate`` or a Trainer, is none the wiser.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from peft_ext.nn._checks import check_sizes
from peft_ext.nn.prompt import PromptEmbedding, PromptEncoder, prepend
from peft_ext.tuners.base import BaseTuner, Placement
from peft_ext.tuners.config import PeftConfig, TaskType
from peft_ext.tuners.generation import cache_of
from peft_ext.tuners.layer import AdapterSlot, Entry, Part, adapter_dtype
from peft_ext.tuners.mixed import check_per_row, current_mix

IGNORED_LABEL = -100
_LEARNED_POSITIONS = ("position_embeddings", "wpe")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the configurations of prompts have. Fields and meaning are Hugging Face PEFT's.

    Args:
        num_virtual_tokens: length of the prompt.
        token_dim: features of the model's embeddings; by default read from the model.
        num_transformer_submodules: 1; models with an encoder and a decoder are not supported.
        num_attention_heads, num_layers: the model's; noted in the file.
        modules_to_save: names of modules that are trained in full and saved with the prompt.
    """

    checkpoint_prefix: ClassVar[str] = "base_model."

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes({"num_virtual_tokens": self.num_virtual_tokens})
        optional = {name: getattr(self, name) for name in ("token_dim", "num_attention_heads", "num_layers")}
        check_sizes({name: size for name, size in optional.items() if size is not None})
        if self.num_transformer_submodules not in (None, 1):
            raise ValueError(f"num_transformer_submodules must be 1, got {self.num_transformer_submodules!r}")
        gated = getattr(self, "gated", False)
        if not isinstance(gated, bool):
            raise TypeError(f"gated must be a bool, got {gated!r}")

    def to_dict(self) -> dict[str, Any]:
        """As in the base class; ``gated`` only where it is set, since Hugging Face PEFT warns of fields it lacks."""
        values = super().to_dict()
        return values if values.get("gated") else {name: value for name, value in values.items() if name != "gated"}


class PromptLayer(AdapterSlot):
    """The model's input embeddings and, by name, the prompts that can go before the text."""

    part_names = ("prompt_encoder",)

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_encoder = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """The embeddings' weight: model code reads its dtype or its device."""
        return self.base_layer.weight

    def prompt(self) -> Tensor | None:
        """The active prompt ``[num_virtual_tokens, token_dim]``, if there is one."""
        if self.disable_adapters or not self.active_adapters:
            return None
        return self.prompt_encoder[self.active_adapters[0]]()

    def forward(self, input_ids: Tensor) -> Tensor:
        upcoming, _local.upcoming = _local.upcoming, None
        if upcoming is None:
            return self.base_layer(input_ids)
        front, text = upcoming
        return front.before(self.base_layer(text))

    def check_active(self, adapter_names: list[str]) -> None:
        if len(adapter_names) > 1:
            raise ValueError(f"only one prompt can be active at a time, got {adapter_names}")

    def checkpoint_key(self, name: str, key: str) -> str:
        """Checkpoints do not say where the prompt is."""
        return key

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """The prompt, as what reads it for inference needs it, and the encoder that it is made by."""
        encoder = parts["prompt_encoder"]
        assert isinstance(encoder, PromptEmbedding)
        if not isinstance(encoder, PromptEncoder):
            weight = encoder.embedding.weight
            yield Entry("prompt_embeddings", f"prompt_encoder.{adapter_name}.embedding.weight", weight)
            return
        yield Entry("prompt_embeddings", None, encoder.prompt_embeddings())
        yield from AdapterSlot.entries(parts, adapter_name)


ConfigT = TypeVar("ConfigT", bound=PromptLearningConfig)


class PromptLearningModel(BaseTuner[ConfigT]):
    """A model with prompts before its input. One is active at a time.

    Outputs of a token each have the virtual tokens' first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._hooks: list[RemovableHandle] = []
        self._longest = longest_input(model)

    def resolve(self, config: ConfigT) -> ConfigT:
        """A copy with the model's sizes filled in."""
        config = copy.deepcopy(config)
        assert config.num_virtual_tokens is not None
        width = self._embeddings(config)[1].weight.size(1)
        if config.token_dim not in (None, width):
            raise ValueError(f"token_dim is {config.token_dim}, but the model's embeddings have {width} features")
        config.token_dim = width
        config.num_transformer_submodules = 1
        config.num_attention_heads = config.num_attention_heads or self._size(_HEADS)
        config.num_layers = config.num_layers or self._size(_LAYERS)
        if self._longest is not None and config.num_virtual_tokens >= self._longest:
            raise ValueError(
                f"num_virtual_tokens is {config.num_virtual_tokens}, but the model takes {self._longest} tokens at most"
            )
        return config

    def plan(self, adapter_name: str, config: ConfigT, autocast_adapter_dtype: bool) -> list[Placement]:
        name, embeddings = self._embeddings(config)
        weight = embeddings.weight
        dtype = adapter_dtype(weight.dtype, autocast_adapter_dtype)
        part = {"prompt_encoder": self.build(config, device=weight.device, dtype=dtype)}
        return [
            Placement(
                name, embeddings, PromptLayer, lambda layer: layer.attach(adapter_name, part), lambda _: self._listen()
            )
        ]

    def build(self, config: ConfigT, **factory: Any) -> PromptEmbedding:
        """The module that makes the prompt; ``factory`` is its device and dtype."""
        raise NotImplementedError

    def _embeddings(self, config: ConfigT) -> tuple[str, Any]:
        """The input embeddings or the slot around them, with their full name.

        Raises:
            ValueError: for a model that has none, or that an input cannot be put before.
        """
        getter = getattr(self.model, "get_input_embeddings", None)
        layer = getter() if getter is not None else None
        takes_ids = "input_ids" in inspect.signature(self.model.forward).parameters
        if not takes_ids or not isinstance(layer, nn.Embedding | PromptLayer):
            raise ValueError(
                f"{config.peft_type} needs a model with forward(input_ids=...) and get_input_embeddings() that returns "
                f"an nn.Embedding: {type(self.model).__name__} is none"
            )
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{config.peft_type} does not support models with an encoder and a decoder")
        names = [name for name, module in self.model.named_modules(remove_duplicate=False) if module is layer]
        if len(names) != 1:
            raise ValueError(f"{config.peft_type} needs input embeddings that are one module, got {names}")
        return names[0], layer

    def _size(self, names: tuple[str, ...]) -> int | None:
        config = getattr(self.model, "config", None)
        return next((getattr(config, name) for name in names if hasattr(config, name)), None)

    def _listen(self) -> None:
        if not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(self._add_prompt, with_kwargs=True),
                self.model.register_forward_hook(_forget_prompt, always_call=True),
            ]

    def _add_prompt(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the model is called with instead: see :func:`lengthen`."""
        names = inspect.signature(model.forward).parameters if args or current_mix() is not None else ()
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        front = self._front(model, inputs)
        if front is None or not front.width:
            return None
        if front.ragged and not front.gap_last and "position_ids" in names:
            inputs.setdefault("position_ids", _default_positions(inputs, front.width))
        task = next(iter(self.peft_config.values())).task_type
        return (), lengthen(inputs, front, labels_per_token=task != TaskType.SEQ_CLS, longest=self._longest)

    def _front(self, model: Any, inputs: Mapping[str, Any]) -> Front | None:
        """What goes before the rows of this call, if anything does."""
        layer, mix = model.get_input_embeddings(), current_mix()
        filler = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        if mix is None or layer.disable_adapters:
            prompt = layer.prompt()
            if prompt is None:
                return None
            return Front([self.open_tokens(self.config_of(layer.active_adapters[0]), prompt)], None, layer, filler)
        check_per_row(mix, "prompts")
        names = layer.mixed_names(mix)
        prompts = [self.open_tokens(self.config_of(name), layer.prompt_encoder[name]()) for name in names]
        generates = getattr(model, "can_generate", None)
        gap_last = generates is None or not generates()
        return Front(prompts, mix.index_among(names, _source(inputs)), layer, filler, gap_last)

    def open_tokens(self, config: ConfigT, prompt: Tensor) -> Tensor:
        """The rows of the prompt that take part."""
        return prompt

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, progressbar: bool) -> None:
        raise ValueError("a prompt is part of the input: there is no weight that it could be merged into")

    def _unload(self, adapter_names: list[str] | None) -> nn.Module:
        for name, slot in list(self.slots()):
            if isinstance(slot, PromptLayer):
                self._replace(name, slot.base_layer)
        for hook in self._hooks:
            hook.remove()
        return super()._unload(adapter_names)


class Front:
    """The virtual tokens that go before the rows of one call.

    Prompts of different lengths leave gaps, which the attention mask hides. A model that generates has them at the
    very front, so that what it adds follows the text; of others, whose first token may be what a pooler takes, they
    are at the end.

    Args:
        prompts: ``[tokens, features]`` each.
        index: int64 ``[batch]``, the prompt of each row or -1 for none; None if all rows have the only one.
        layer: the embeddings.
        filler: token id of the gaps.
        gap_last: whether gaps are at the end.
    """

    def __init__(
        self, prompts: list[Tensor], index: Tensor | None, layer: PromptLayer, filler: int, gap_last: bool = False
    ) -> None:
        self.prompts = prompts
        self.index = index
        self.virtual_id = layer.base_layer.num_embeddings
        self.filler = filler
        self.gap_last = gap_last
        self.width = max([0, *map(len, prompts)])
        self.ragged = index is not None

    def counts(self, like: Tensor) -> Tensor | int:
        """How many virtual tokens each row has, ``[batch, 1]``; a number if all have the same."""
        if self.index is None:
            return self.width
        lengths = torch.tensor([*map(len, self.prompts), 0], device=like.device)
        return lengths[self.index.to(like.device)].unsqueeze(1)

    def values(self, rows: Tensor, value: int, gap: int) -> Tensor:
        """``[batch, length]`` with ``value`` for each virtual token before it, and ``gap`` in the gaps."""
        columns = torch.arange(self.width, device=rows.device)
        block = torch.where(columns >= self.width - self.counts(rows), value, gap).to(rows.dtype)
        return self._arranged(torch.cat([block.expand(rows.size(0), -1), rows], dim=1))

    def positions(self, rows: Tensor) -> Tensor:
        """Position ids of the virtual tokens, before those of the text moved on."""
        counts = self.counts(rows)
        columns = torch.arange(self.width, device=rows.device)
        block = (columns - self.width + counts).clamp_min(0)
        moved = rows + counts
        return self._arranged(torch.cat([block.expand(*moved.shape[:-1], -1), moved], dim=-1))

    def before(self, embeds: Tensor) -> Tensor:
        """The prompts before the text's embeddings ``[batch, length, features]``."""
        if self.index is None:
            return prepend(self.prompts[0], embeds)
        padded = [F.pad(prompt, (0, 0, self.width - len(prompt), 0)).to(embeds.dtype) for prompt in self.prompts]
        table = torch.stack([*padded, torch.zeros_like(padded[0])])  # -1 counts from the end
        return self._arranged(torch.cat([table[self.index], embeds], dim=1))

    def _arranged(self, rows: Tensor) -> Tensor:
        if self.index is None or not self.gap_last:
            return rows
        columns = torch.arange(rows.size(1), device=rows.device)
        order = (columns < self.width - self.counts(rows)).to(torch.uint8).argsort(dim=1, stable=True)
        return rows.take_along_dim(order.view(*order.shape, *[1] * (rows.dim() - 2)), dim=1)


class _Local(threading.local):
    """What the next look-up of this thread begins with, and the ids of the text; the model's hook sets it."""

    def __init__(self) -> None:
        self.upcoming: tuple[Front, Tensor] | None = None


_local = _Local()


def lengthen(inputs: dict[str, Any], front: Front, labels_per_token: bool, longest: int | None) -> dict[str, Any]:
    """The inputs of a transformers model with prompts before them.

    With a key-value cache that holds tokens already, the prompts are the first of them: then only the
    mask grows and positions move on.

    Args:
        inputs: by name, without those that are None.
        front: the prompts.
        labels_per_token: whether integer labels of the shape of the input belong to its tokens.
        longest: how many positions the model has learned, if it has learned any.

    Raises:
        ValueError: without ``input_ids`` and ``inputs_embeds``, for more tokens than ``longest``, for a mask that is
            not ``[batch, length]``, and where prompts of different lengths need what the model does not take.
    """
    source = _source(inputs)
    shape = source.shape[:2]
    if longest is not None:
        check_length(front.width, shape[1], longest)
    cache = cache_of(inputs)
    cached = cache.get_seq_length() if cache is not None else 0
    changed = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is None and front.ragged:
        mask = source.new_ones(shape[0], max(cached - front.width, 0) + shape[1], dtype=torch.int64)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(
                "with a prompt, attention_mask must be [batch, length], got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} (static caches make others)"
            )
        changed["attention_mask"] = front.values(mask, 1, 0)
    if cached > 0:
        if front.ragged and front.gap_last:
            raise ValueError("prompts of several adapters and a cache that holds tokens need a model that generates")
        return changed | _moved(inputs, front)
    if "cache_position" in inputs:
        first = torch.arange(front.width, device=source.device)
        changed["cache_position"] = torch.cat([first, inputs["cache_position"] + front.width])
    if "position_ids" in inputs:
        changed["position_ids"] = front.positions(inputs["position_ids"])
    for name in ("start_positions", "end_positions"):
        if name in inputs:
            counts = front.counts(source)
            changed[name] = inputs[name] + (counts if isinstance(counts, int) else counts.squeeze(1))
    if "token_type_ids" in inputs:
        changed["token_type_ids"] = front.values(inputs["token_type_ids"], 0, 0)
    labels = inputs.get("labels")
    if labels_per_token and labels is not None and labels.shape == shape and not labels.is_floating_point():
        changed["labels"] = front.values(_without_first(labels, front), IGNORED_LABEL, IGNORED_LABEL)
    if "input_ids" in inputs:
        changed["input_ids"] = front.values(source, front.virtual_id, front.filler)
        _local.upcoming = (front, source)
    else:
        changed["inputs_embeds"] = front.before(source)
    return changed


def _source(inputs: Mapping[str, Any]) -> Tensor:
    source = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if source is None:
        raise ValueError("a prompt needs input_ids or inputs_embeds to go before")
    return source


def _moved(inputs: Mapping[str, Any], front: Front) -> dict[str, Tensor]:
    """The positions of tokens after what is cached."""
    moved = {}
    if "cache_position" in inputs:
        moved["cache_position"] = inputs["cache_position"] + front.width
    if "position_ids" in inputs:
        moved["position_ids"] = inputs["position_ids"] + front.counts(inputs["position_ids"])
    return moved


def _default_positions(inputs: Mapping[str, Any], width: int) -> Tensor:
    """Position ids of the text where none are given: a model would count the gaps, too."""
    source, cache = _source(inputs), cache_of(inputs)
    start = max(cache.get_seq_length() - width, 0) if cache is not None else 0
    return torch.arange(start, start + source.size(1), device=source.device).unsqueeze(0)


def _without_first(labels: Tensor, front: Front) -> Tensor:
    """The labels without the first one of rows that have a gap right before it, which is not to predict it."""
    if front.index is None or front.gap_last:
        return labels
    has_gap = torch.as_tensor(front.counts(labels) == 0, device=labels.device)
    return torch.cat([labels[:, :1].masked_fill(has_gap, IGNORED_LABEL), labels[:, 1:]], dim=1)


def _forget_prompt(model: Any, *_: Any) -> None:
    """After a call that failed before it looked its tokens up, later look-ups must not begin with the prompt."""
    _local.upcoming = None


def longest_input(model: nn.Module) -> int | None:
    """How many learned positions a model has; None without such."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _LEARNED_POSITIONS and isinstance(module, nn.Embedding):
            # RoBERTa's begin after the padding index
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_length(prompt: int, text: int, longest: int) -> None:
    """Raises a ValueError if both together are more tokens than the model has learned positions."""
    if prompt + text > longest:
        raise ValueError(
            f"a prompt of {prompt} tokens and an input of {text} are more than the model's {longest} learned "
            "positions: shorten the input"
        )
