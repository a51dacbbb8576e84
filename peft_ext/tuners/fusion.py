"""AdapterFusion (Pfeiffer et al., arXiv:2005.00247): trained adapters, frozen, and a learned mix of what they give."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn import Adapter, AttentionFusion
from peft_ext.nn._checks import check_not_negative
from peft_ext.serialization import hf_peft
from peft_ext.tuners.adapter_drop import DropState
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.checkpoint import read_checkpoint
from peft_ext.tuners.config import CONFIG_CLASSES, PeftConfig, PeftType, check_list
from peft_ext.tuners.houlsby import HoulsbyConfig, HoulsbyModel
from peft_ext.tuners.mixed import AdapterNames
from peft_ext.tuners.pfeiffer import NormSlot, PfeifferModel
from peft_ext.tuners.state_dict import differences
from peft_ext.tuners.sublayer_tuner import (
    SublayerConfig,
    SublayerSlot,
    SublayerTuner,
    find_places,
    find_sites,
    place,
)
from peft_ext.tuners.sublayers import resolve_sublayers

Weights = Mapping[str, Tensor]
_TUNERS: dict[str | None, type[SublayerTuner]] = {PeftType.HOULSBY: HoulsbyModel, PeftType.PFEIFFER: PfeifferModel}


@dataclass
class AdapterFusionConfig(PeftConfig):
    r"""Configuration of AdapterFusion over trained adapters, all by ``HoulsbyConfig`` or all by ``PfeifferConfig``.

    Where the adapters gave x + f(x), the fusion gives x + V Σ wᵢ fᵢ(x), w = softmax over i of Q(x) · K(fᵢ(x)): see
    :class:`peft_ext.AttentionFusion`. It trains, with ``modules_to_save``; the adapters are frozen. Of their folders
    only the adapters are taken, no heads. What is saved holds copies of them, so it needs these folders no more.

    Args:
        adapters: the folders of the adapters, or their names on the Hugging Face hub. They may differ in bottleneck
            width, but not in where in the model they are.
        regularisation: strength of ‖I - V‖², which a model's own loss has added to it in training.
        modules_to_save: names of modules that are trained in full and saved with the fusion, such as the head.
        adapter_configs: the adapters' configurations; filled in.

    Raises:
        TypeError, ValueError: for a value out of range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft_ext import AdapterFusionConfig, PfeifferConfig, get_peft_model
        >>> from peft_ext.models import MiniGPT
        >>> def base():
        ...     return MiniGPT(100, 32, 16, n_layers=2, n_heads=4, method="none")
        >>> with TemporaryDirectory() as folder:
        ...     for task in ("a", "b"):
        ...         get_peft_model(base(), PfeifferConfig()).save_pretrained(f"{folder}/{task}")
        ...     model = get_peft_model(base(), AdapterFusionConfig(adapters=[f"{folder}/a", f"{folder}/b"]))
        >>> model.get_nb_trainable_parameters()[0]  # in each of two layers: query, key, value
        6272
    """

    adapters: list[str] | None = None
    regularisation: float = 0.01
    modules_to_save: list[str] | None = None
    adapter_configs: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTER_FUSION
        names = self.adapters
        if not isinstance(names, list | tuple) or not all(isinstance(name, str | os.PathLike) for name in names):
            raise TypeError(f"adapters must be a list of folders, got {names!r}")
        if not names:
            raise ValueError("adapters must name at least one trained adapter, got an empty list")
        self.adapters = [os.fspath(name) for name in names]
        check_not_negative({"regularisation": self.regularisation})
        check_list("adapter_configs", self.adapter_configs, dict)
        if self.adapter_configs is not None and len(self.adapter_configs) != len(names):
            raise ValueError(
                f"adapter_configs must be one for each of the {len(names)} adapters, got {len(self.adapter_configs)}"
            )

    def named_adapters(self) -> Iterator[tuple[str, SublayerConfig]]:
        """The adapters' folders and configurations, once these are filled in.

        Raises:
            ValueError: for an adapter of another kind.
        """
        assert self.adapters is not None and self.adapter_configs is not None
        for name, values in zip(self.adapters, self.adapter_configs, strict=True):
            config = PeftConfig.from_dict(values)
            if config.peft_type not in _TUNERS or not isinstance(config, SublayerConfig):
                raise ValueError(
                    f"adapters: {name!r} is of peft_type {values['peft_type']!r}, "
                    "but only HOULSBY and PFEIFFER can be fused"
                )
            if isinstance(config, HoulsbyConfig) and config.train_layer_norms:
                raise ValueError(
                    f"adapters: {name!r} has trained the model's layer norms, of which fused adapters share one set: "
                    "train it with HoulsbyConfig(train_layer_norms=False)"
                )
            yield name, config


class FusedAdapters(nn.Module):
    """Several frozen adapters without their residuals, and the attention that mixes them.

    Args:
        adapters: of equal width.
        fusion: for their number.
        residual: whether the input is added to the mix.
        strength: of the fusion's regularisation.
    """

    def __init__(self, adapters: Sequence[Adapter], fusion: AttentionFusion, residual: bool, strength: float) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.fusion = fusion
        self.residual = residual
        self.strength = strength
        self.adapters.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.fusion(x, [adapter(x) for adapter in self.adapters], residual=x if self.residual else None)

    def requires_grad_(self, requires_grad: bool = True) -> FusedAdapters:
        """Trains or freezes the fusion: the adapters stay frozen."""
        self.fusion.requires_grad_(requires_grad)
        return self

    def regularisation(self) -> Tensor:
        return self.fusion.regularisation(self.strength)


class AdapterFusionModel(BaseTuner[AdapterFusionConfig]):
    """A model with fused adapters in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._weights: list[Weights] = []

    def add_adapter(
        self,
        adapter_name: str,
        config: AdapterFusionConfig,
        autocast_adapter_dtype: bool = True,
        tensors: Weights | None = None,
    ) -> None:
        """As in the base class. Without ``tensors``, which hold all, the adapters are read from their folders."""
        if tensors is None:
            config = copy.deepcopy(config)
            assert config.adapters is not None
            folders = [hf_peft.find_folder(name) for name in config.adapters]
            read = [read_checkpoint(folder, self.model) for folder in folders]
            config.adapter_configs = [values for values, _ in read]
            self._weights = [weights for _, weights in read]
        try:
            super().add_adapter(adapter_name, config, autocast_adapter_dtype, tensors)
        finally:
            self._weights = []

    def resolve(self, config: AdapterFusionConfig) -> AdapterFusionConfig:
        config = copy.deepcopy(config)
        if config.adapter_configs is None:
            assert config.adapters is not None
            folders = [hf_peft.find_folder(name) for name in config.adapters]
            config.adapter_configs = [read_checkpoint(folder, self.model)[0] for folder in folders]
        return config

    def plan(self, adapter_name: str, config: AdapterFusionConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        members = list(config.named_adapters())
        tuner = _common_tuner(members)
        places = self._common_places(members, tuner)
        sites = find_sites(self.model, places, autocast_adapter_dtype)
        kinds = [tuner.slot_class(site.base_layer, members[0][1]) for site in sites]
        fused = {}
        for site, kind in zip(sites, kinds, strict=True):
            width = site.width
            options: dict[str, Any] = {"device": site.like.device, "dtype": site.like.dtype}
            adapters = [
                Adapter(width, member.inner_width(width), activation=member.non_linearity, **options)
                for _, member in members
            ]
            fusion = AttentionFusion(width, len(adapters), **options)
            fused[site.name] = FusedAdapters(adapters, fusion, kind is not NormSlot, config.regularisation)
        for index, weights in enumerate(self._weights):
            _load(members[index][0], weights, {name: module.adapters[index] for name, module in fused.items()})
        return [
            place(adapter_name, site, kind, DropState(), {"adapter": fused[site.name]})
            for site, kind in zip(sites, kinds, strict=True)
        ]

    def forward(self, *args: Any, adapter_names: AdapterNames | None = None, **kwargs: Any) -> Any:
        """The model's output; in training its ``loss``, if it has one, includes the regularisation of the fusions."""
        output = super().forward(*args, adapter_names=adapter_names, **kwargs)
        if self.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + self._regularisation(self.names_in_use(adapter_names))
        return output

    def fusion_regularisation(self) -> Tensor:
        """The sum of ``regularisation`` · ‖I - V‖² over the fusions at work, for a loss that is not the model's own."""
        return self._regularisation(self.active_adapters)

    def _regularisation(self, adapter_names: Sequence[str]) -> Tensor:
        slots: list[Any] = [
            slot for _, slot in self.slots() if isinstance(slot, SublayerSlot) and not slot.is_dropped()
        ]
        fused = [slot.adapter[name] for slot in slots for name in adapter_names if name in slot]
        terms = [module.regularisation() for module in fused if isinstance(module, FusedAdapters)]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _common_places(
        self, members: Sequence[tuple[str, SublayerConfig]], tuner: type[SublayerTuner]
    ) -> dict[str, nn.Module]:
        """Where the adapters go, all of them alike."""
        places: dict[str, nn.Module] = {}
        for name, config in members:
            config.target_modules = resolve_sublayers(self.model, config, tuner.places)
            found = find_places(self.model, config)
            places = places or found
            different = sorted(found.keys() ^ places.keys())
            if different:
                raise ValueError(
                    f"adapters: {members[0][0]!r} and {name!r} are not in the same places: "
                    f"only one of them has an adapter at {different[0]!r}"
                )
        return places


def _common_tuner(members: Sequence[tuple[str, SublayerConfig]]) -> type[SublayerTuner]:
    kinds = {str(PeftType(config.peft_type).value): name for name, config in members}
    if len(kinds) > 1:
        shown = ", ".join(f"{name!r} is of peft_type {kind}" for kind, name in kinds.items())
        raise ValueError(f"adapters must be of one kind, since they are in different places: {shown}")
    return _TUNERS[members[0][1].peft_type]


@torch.no_grad()
def _load(folder: str, weights: Weights, adapters: Mapping[str, nn.Module]) -> None:
    """Copies the values that an adapter's checkpoint has into ``adapters``, given by the places' names."""
    own = {
        f"{PeftConfig.checkpoint_prefix}{name}.adapter.{key}": tensor
        for name, adapter in adapters.items()
        for key, tensor in adapter.state_dict().items()
    }
    weights = {key: tensor for key, tensor in weights.items() if ".adapter." in key}
    problems = differences(weights, own, own)
    if problems:
        raise ValueError(f"the adapter in {folder!r} does not fit the model: {'; '.join(problems)}")
    for key, tensor in weights.items():
        own[key].copy_(tensor)


CONFIG_CLASSES[PeftType.ADAPTER_FUSION] = AdapterFusionConfig
TUNER_CLASSES[PeftType.ADAPTER_FUSION] = AdapterFusionModel
