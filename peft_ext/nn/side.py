"""Side-tuning: a small network beside a frozen one (Zhang et al., 2019)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

_BLENDED_FIELDS = ("last_hidden_state", "pooler_output")


class SideNetwork(nn.Module):
    """alpha B(x) + (1 - alpha) S(x), alpha = sigmoid(a): a frozen base B and a side network S, mixed by one number.

    The base runs without gradients. a starts at zero, so alpha at one half.

    Args:
        base: the backbone; frozen here.
        side: takes the same arguments and gives an output of the same shape; trains, but for parameters that it
            shares with the base. See :func:`first_layers` and :class:`SideMLP`.

    Attributes:
        a: the logit of alpha, a scalar.

    Raises:
        ValueError: in forward, for outputs of different shapes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import SideNetwork
        >>> model = SideNetwork(nn.Linear(8, 4), nn.Linear(8, 4))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['a', 'side.weight', 'side.bias']
        >>> float(model.alpha), model(torch.zeros(2, 8)).shape
        (0.5, torch.Size([2, 4]))
    """

    def __init__(self, base: nn.Module, side: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.side = side
        self.a = nn.Parameter(torch.zeros(()))

    @property
    def alpha(self) -> Tensor:
        """The base's share, in (0, 1)."""
        return self.a.sigmoid()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mix of both outputs: a tensor, or the tuple or transformers output that the base gives."""
        with torch.no_grad():
            output = self.base(*args, **kwargs)
        return blend(output, self.side(*args, **kwargs), self.alpha)


class SideMLP(nn.Module):
    """down, gelu, up: a side network for backbones that take one tensor, or token ids.

    Args:
        in_features, hidden_features, out_features: sizes.
        embedding: what the tokens go through first: the base's own.
        pooler: makes a ``pooler_output`` of the output, for bases that give one: the base's own.

    Example:
        >>> import torch
        >>> from peft_ext.nn import SideMLP
        >>> SideMLP(8, 2, 4)(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        embedding: nn.Module | None = None,
        pooler: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.pooler = pooler
        self.down = nn.Linear(in_features, hidden_features)
        self.activation = nn.GELU()
        self.up = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """Maps ``x`` ``[..., in_features]``, or with an embedding token ids, to ``[..., out_features]``.

        Token ids may come as ``input_ids``, their embeddings as ``inputs_embeds``; what else a backbone takes (masks,
        positions) does not matter to it. With a pooler a dict of ``last_hidden_state`` and ``pooler_output``.
        """
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            tokens = kwargs.get("input_ids") if x is None else x
            embedded = tokens if self.embedding is None else self.embedding(tokens)
        output = self.up(self.activation(self.down(embedded)))
        return output if self.pooler is None else {"last_hidden_state": output, "pooler_output": self.pooler(output)}


def first_layers(backbone: nn.Module, num_layers: int) -> nn.Module:
    """A side network that is the backbone with its first layers only, which start as copies of the backbone's.

    Embeddings are the backbone's own, not copied; all else is. In an ``nn.Sequential`` the layers are its modules, in
    other models those of the longest ``nn.ModuleList``.

    Args:
        backbone: left as it is.
        num_layers: how many layers.

    Raises:
        ValueError: for a backbone without such layers, or with fewer than ``num_layers``.

    Example:
        >>> from torch import nn
        >>> from peft_ext.nn import first_layers
        >>> len(first_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), 2))
        2
    """
    if isinstance(backbone, nn.Sequential):
        _check_layers(num_layers, len(backbone))
        return copy.deepcopy(backbone[:num_layers])
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"a {type(backbone).__name__} has no list of layers to take the first {num_layers} of")
    layers = max(lists, key=len)
    _check_layers(num_layers, len(layers))
    # what deepcopy finds here it takes for copied already
    memo: dict[int, Any] = {id(module): module for module in backbone.modules() if isinstance(module, nn.Embedding)}
    memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in layers[:num_layers])
    side: Any = copy.deepcopy(backbone, memo)
    if hasattr(getattr(side, "config", None), "num_hidden_layers"):
        side.config.num_hidden_layers = num_layers
    return side


def input_embeddings(backbone: nn.Module) -> nn.Module | None:
    """The token embeddings of a transformers model."""
    getter = getattr(backbone, "get_input_embeddings", None)
    return None if getter is None else getter()


def blend(base: Any, side: Any, alpha: Tensor) -> Any:
    """alpha base + (1 - alpha) side; of tuples and transformers outputs what is a hidden state, the rest is base's.

    Raises:
        ValueError: where the side network gives nothing to mix with, or another shape.
    """
    if isinstance(base, Tensor):
        return _blend_tensors(base, _first(side), alpha)
    if not isinstance(base, Mapping):
        others = tuple(side.values()) if isinstance(side, Mapping) else (side,) if isinstance(side, Tensor) else side
        pairs = list(zip_longest(base, others[: len(base)]))
        if not any(_are_hidden(b, s) for b, s in pairs):
            raise ValueError("the base and the side network give no tensor at the same place of their outputs to mix")
        return tuple(_blend_tensors(b, s, alpha) if _are_hidden(b, s) else b for b, s in pairs)
    names = [name for name in _BLENDED_FIELDS if isinstance(base.get(name), Tensor)]
    if not names:
        raise ValueError(
            f"the base gives {', '.join(map(str, base))}, none of which can be mixed: it must give a tensor, a tuple, "
            f"or one of {', '.join(_BLENDED_FIELDS)}"
        )
    mixed: Any = copy.copy(base)
    for name in names:
        mixed[name] = _blend_tensors(base[name], _field(side, name), alpha)
    return mixed


def _field(side: Any, name: str) -> Tensor:
    value = side.get(name) if isinstance(side, Mapping) else side if name == _BLENDED_FIELDS[0] else None
    if not isinstance(value, Tensor):
        raise ValueError(f"the side network gives no {name}, which the base does: return a dict that has it")
    return value


def _are_hidden(base: Any, side: Any) -> bool:
    return isinstance(base, Tensor) and isinstance(side, Tensor)


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    return output if isinstance(output, Tensor) else output[0]


def _blend_tensors(base: Tensor, side: Tensor, alpha: Tensor) -> Tensor:
    if base.shape != side.shape:
        raise ValueError(f"the side network gives {list(side.shape)}, but the base {list(base.shape)}")
    return torch.lerp(side.to(base.dtype), base, alpha.to(base.dtype))


def _check_layers(wanted: int, there: int) -> None:
    if not 1 <= wanted <= there:
        raise ValueError(f"num_layers must be between 1 and the backbone's {there}, got {wanted}")
