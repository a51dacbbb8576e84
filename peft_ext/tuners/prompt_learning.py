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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_ext.nn._checks import check_sizes
from peft_ext.nn.prompt import PromptEmbedding, PromptEncoder, prepend
from peft_ext.tuners.base import BaseTuner, Placement
from peft_ext.tuners.config import PeftConfig, TaskType
from peft_ext.tuners.generation import cache_of
from peft_ext.tuners.layer import AdapterSlot, Entry, Part, adapter_dtype

IGNORED_LABEL = -100
EXTENSIONS = {"gated": False, "shift_positions": True}
"""Fields that Hugging Face PEFT lacks, with the values at which they change nothing."""
_POSITIONS = ("position_ids", "cache_position")
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
        """As in the base class; extensions only where used: Hugging Face PEFT warns of fields it lacks."""
        unused = EXTENSIONS.items()
        return {name: value for name, value in super().to_dict().items() if (name, value) not in unused}


def has_closed_tokens(config: PromptLearningConfig, prompt: Tensor) -> bool:
    """Whether a gate has closed a token of a checkpoint's ``prompt_embeddings``, which must be left out then."""
    if not getattr(config, "gated", False):
        return False
    layers = config.num_layers if "PREFIX" in str(config.peft_type) else 1
    return bool(prompt.view(len(prompt), layers or 1, -1).eq(0).all(dim=2).any())


class PromptLayer(AdapterSlot):
    """The model's input embeddings and, by name, the prompts that can go before the text.

    ``upcoming`` holds the prompt whose ids the next look-up begins with; the model's hook sets it. (A tuple, since a
    parameter that is set as an attribute would become one of this module's.)
    """

    part_names = ("prompt_encoder",)

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_encoder = nn.ModuleDict()
        self.upcoming: tuple[Tensor, ...] = ()

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
        upcoming, self.upcoming = self.upcoming, ()
        if not upcoming:
            return self.base_layer(input_ids)
        (prompt,) = upcoming
        return prepend(prompt, self.base_layer(input_ids[:, len(prompt) :]))

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
        layer = model.get_input_embeddings()
        prompt = layer.prompt()
        if prompt is None:
            return None
        config = self.config_of(layer.active_adapters[0])
        prompt = self.open_tokens(config, prompt)
        if not len(prompt):
            return None
        names = inspect.signature(model.forward).parameters if args else ()
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        per_token = config.task_type != TaskType.SEQ_CLS
        return (), lengthen(inputs, layer, prompt, labels_per_token=per_token, longest=self._longest)

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


def lengthen(
    inputs: dict[str, Any], layer: PromptLayer, prompt: Tensor, labels_per_token: bool, longest: int | None
) -> dict[str, Any]:
    """The inputs of a transformers model with a prompt before them.

    With a key-value cache that holds tokens already, the prompt is the first of them: then only the
    mask grows and positions move on.

    Args:
        inputs: by name, without those that are None.
        layer: looks ``input_ids`` up.
        prompt: ``[P, D]``, P > 0.
        labels_per_token: whether integer labels of the shape of the input belong to its tokens.
        longest: how many positions the model has learned, if it has learned any.

    Raises:
        ValueError: without ``input_ids`` and ``inputs_embeds``, for more tokens than ``longest``, and for a mask
            that is not ``[batch, length]``.
    """
    source = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if source is None:
        raise ValueError("a prompt needs input_ids or inputs_embeds to go before")
    count, shape = len(prompt), source.shape[:2]
    if longest is not None:
        check_length(count, shape[1], longest)
    changed = dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(
                "with a prompt, attention_mask must be [batch, length], got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} (static caches make others)"
            )
        changed["attention_mask"] = _front(mask, count, 1)
    cache = cache_of(inputs)
    if cache is not None and cache.get_seq_length() > 0:
        return changed | {name: inputs[name] + count for name in _POSITIONS if name in inputs}
    for name in _POSITIONS:
        if name in inputs:
            first = torch.arange(count, device=inputs[name].device).expand(*inputs[name].shape[:-1], count)
            changed[name] = torch.cat([first, inputs[name] + count], dim=-1)
    for name in ("start_positions", "end_positions"):
        if name in inputs:
            changed[name] = inputs[name] + count
    if "token_type_ids" in inputs:
        changed["token_type_ids"] = _front(inputs["token_type_ids"], count, 0)
    labels = inputs.get("labels")
    if labels_per_token and labels is not None and labels.shape == shape and not labels.is_floating_point():
        changed["labels"] = _front(labels, count, IGNORED_LABEL)
    if "input_ids" in inputs:
        changed["input_ids"] = _front(source, count, layer.base_layer.num_embeddings)
        layer.upcoming = (prompt,)
    else:
        changed["inputs_embeds"] = prepend(prompt, source)
    return changed


def _front(rows: Tensor, count: int, value: int) -> Tensor:
    """``[B, T]`` with ``count`` columns of ``value`` before it."""
    return torch.cat([rows.new_full((rows.size(0), count), value), rows], dim=1)


def _forget_prompt(model: Any, *_: Any) -> None:
    """After a call that failed before it looked its tokens up, later look-ups must not begin with the prompt."""
    model.get_input_embeddings().upcoming = ()


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
