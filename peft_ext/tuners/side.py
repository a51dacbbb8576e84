"""Side-tuning: a frozen backbone, and a small network beside it (Zhang et al., 2019)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.nn.side import SideMLP, blend, first_layers, input_embeddings
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftConfig, PeftType
from peft_ext.tuners.generation import cache_of
from peft_ext.tuners.layer import AdapterSlot, Entry, Part, StandIn, TunerLayer


@dataclass
class SideTuningConfig(PeftConfig):
    r"""Configuration of side-tuning: alpha B(x) + (1 - alpha) S(x), with alpha = sigmoid(a) learned from a = 0.

    The backbone B is frozen and runs without gradients. A backbone that is called with a cache cannot be mixed with a
    side network that has not seen the tokens before: such a call is refused, and ``generate()`` runs without.

    Args:
        side: which side network S: "layers", the backbone's first ones (:func:`peft_ext.nn.first_layers`); "mlp", a
            small one for each position (:class:`peft_ext.nn.SideMLP`); or a name in :data:`SIDE_NETWORKS`, where a
            network of one's own is entered under a name.
        num_layers: of "layers": how many.
        hidden_features: of "mlp": its inner width.
        backbone: name of the module that is the backbone. None takes a transformers model's body, without its head.
        modules_to_save: names of modules outside of the backbone that are trained in full and saved, such as the head.

    Raises:
        TypeError, ValueError: for values out of range, here or when a model is adapted.

    Example:
        >>> from collections import OrderedDict
        >>> from torch import nn
        >>> from peft_ext import SideTuningConfig, get_peft_model
        >>> body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(8, 2)))
        >>> config = SideTuningConfig(backbone="body", num_layers=1, modules_to_save=["head"])
        >>> model = get_peft_model(model, config)
        >>> model.get_nb_trainable_parameters()[0]  # one layer, a, the head
        91
    """

    side: str = "layers"
    num_layers: int = 2
    hidden_features: int = 64
    backbone: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SIDE_TUNING
        check_sizes({"num_layers": self.num_layers, "hidden_features": self.hidden_features})
        if not isinstance(self.side, str):
            raise TypeError(f"side must be a name in SIDE_NETWORKS, got {self.side!r}")
        if not isinstance(self.backbone, str | None):
            raise TypeError(f"backbone must be a module's name or None, got {self.backbone!r}")


def _layers_network(backbone: nn.Module, config: SideTuningConfig) -> nn.Module:
    return first_layers(backbone, config.num_layers)


def _mlp_network(backbone: nn.Module, config: SideTuningConfig) -> nn.Module:
    embeddings: Any = input_embeddings(backbone)
    if embeddings is not None:
        width = embeddings.embedding_dim
        return SideMLP(width, config.hidden_features, width, embeddings, getattr(backbone, "pooler", None))
    linear = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"side='mlp' needs a backbone with linear layers, to know its sizes, got {type(backbone).__name__}"
        )
    return SideMLP(linear[0].in_features, config.hidden_features, linear[-1].out_features)


SIDE_NETWORKS: dict[str, Callable[[nn.Module, SideTuningConfig], nn.Module]] = {
    "layers": _layers_network,
    "mlp": _mlp_network,
}
"""What makes a side network for a backbone, by the name that ``SideTuningConfig.side`` has.

Enter your own before you adapt a model or load an adapter: ``SIDE_NETWORKS["mine"] = lambda backbone, config: Mine()``.
The network takes what the backbone takes and gives an output of the same shape.
"""


class SideLayer(StandIn, TunerLayer):
    """A backbone with the side networks of several adapters."""

    part_names = ("side_networks", "a")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.side_networks = nn.ModuleDict()
        self.a = nn.ParameterDict()

    def _own(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The adapter's parameters without those that its network shares with the backbone."""
        shared = {id(parameter) for parameter in self.base_layer.parameters()}
        yield from (p for p in self.side_networks[adapter_name].parameters() if id(p) not in shared)
        yield self.a[adapter_name]

    def attach(self, adapter_name: str, parts: Mapping[str, Part]) -> None:
        for attribute, part in parts.items():
            getattr(self, attribute)[adapter_name] = part
        self.train_adapter(adapter_name, False)

    def train_adapter(self, adapter_name: str, requires_grad: bool) -> None:
        if adapter_name in self:
            for parameter in self._own(adapter_name):
                parameter.requires_grad_(requires_grad)

    def entries(self, parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:  # type: ignore[override]
        """As in the base class, without the tensors that the network shares with the backbone."""
        shared = {id(tensor) for tensor in self.base_layer.state_dict(keep_vars=True).values()}
        for entry in AdapterSlot.entries(parts, adapter_name):
            if id(entry.tensor) not in shared:
                yield entry

    def check_active(self, adapter_names: list[str]) -> None:
        mine = [name for name in adapter_names if name in self]
        if len(mine) > 1:
            raise ValueError(f"adapters {mine} cannot be active together: each has its own side network")

    def check_merge(self, adapter_names: list[str]) -> None:
        raise ValueError("a side network cannot be merged into its backbone")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(*args, **kwargs)
        if cache_of(kwargs) is not None:
            raise ValueError("a side network keeps no cache: call the model with use_cache=False and without a cache")
        name = self.active_adapters[0]
        with torch.no_grad():
            output = self.base_layer(*args, **kwargs)
        return blend(output, self.side_networks[name](*args, **kwargs), self.a[name].sigmoid())


class SideTuningModel(BaseTuner[Any]):
    """A model whose backbone has side networks."""

    mixes = False

    def resolve(self, config: SideTuningConfig) -> SideTuningConfig:
        config = copy.deepcopy(config)
        config.backbone = self._backbone_name(config)
        return config

    def plan(self, adapter_name: str, config: SideTuningConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        if config.side not in SIDE_NETWORKS:
            raise ValueError(f"side must be one of {sorted(SIDE_NETWORKS)}, got {config.side!r}")
        name = str(config.backbone)
        module = self.model.get_submodule(name)
        backbone = module.base_layer if isinstance(module, SideLayer) else module
        side = SIDE_NETWORKS[config.side](backbone, config)
        reference = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        _match(side, backbone, reference)
        parts: dict[str, Part] = {
            "side_networks": side,
            "a": nn.Parameter(torch.zeros((), device=reference.device)),
        }
        return [Placement(name, module, SideLayer, lambda layer: layer.attach(adapter_name, parts))]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, which reads the whole text at every step: side networks keep no cache."""
        model: Any = self.model
        return model.generate(*args, **{"use_cache": False, **kwargs})

    def _backbone_name(self, config: SideTuningConfig) -> str:
        names = dict(self.model.named_modules())
        if config.backbone is not None:
            if config.backbone not in names or not config.backbone:
                raise ValueError(
                    f"backbone {config.backbone!r} is no module of the model, which has: {_children(names)}"
                )
            return config.backbone
        prefix = getattr(self.model, "base_model_prefix", "")
        if not prefix or prefix not in names:
            raise ValueError(
                f"backbone must be given for this model ({type(self.model).__name__}): one of {_children(names)}"
            )
        return prefix


def _children(names: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in names if name and "." not in name]


def _match(side: nn.Module, backbone: nn.Module, like: Tensor) -> None:
    """Puts the side network's own parameters on the backbone's device and into its dtype."""
    shared = {id(parameter) for parameter in backbone.parameters()}
    for parameter in side.parameters():
        if id(parameter) not in shared and parameter.is_floating_point():
            parameter.data = parameter.data.to(like)


CONFIG_CLASSES[PeftType.SIDE_TUNING] = SideTuningConfig
TUNER_CLASSES[PeftType.SIDE_TUNING] = SideTuningModel
