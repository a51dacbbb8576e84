"""Houlsby adapters (Houlsby et al., arXiv:1902.00751): y = x + up(gelu(down(x))) on both sublayers' outputs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from peft_ext.nn import SimpleAdapter
from peft_ext.nn._checks import check_not_negative
from peft_ext.tuners.base import TUNER_CLASSES
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType
from peft_ext.tuners.sublayer_tuner import Site, SublayerConfig, SublayerTuner
from peft_ext.tuners.targets import is_within, outside_slots


@dataclass
class HoulsbyConfig(SublayerConfig):
    """Configuration of Houlsby adapters, in the original paper's form.

    An adapter works on the output of attention and one on that of the FFN, before the residual is
    added. At the start it changes next to nothing.

    Args:
        train_layer_norms: train the model's layer norms too: each adapter has copies of its own, which
            are saved with it, as those of ``modules_to_save`` are. A norm that is a target stays frozen.
        init_std: deviation of the initial weights, a normal distribution cut off at two deviations.

    The further arguments are those of :class:`SublayerConfig`.

    Example:
        >>> from torch import nn
        >>> from peft_ext import HoulsbyConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> model = get_peft_model(model, HoulsbyConfig(bottleneck_dim=4, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 148 || all params: 326 || trainable%: 45.3988
    """

    non_linearity: str = "gelu"
    train_layer_norms: bool = True
    init_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HOULSBY
        check_not_negative({"init_std": self.init_std})


class HoulsbyModel(SublayerTuner[HoulsbyConfig]):
    """A model with Houlsby adapters in it."""

    def saved_modules(self, config: HoulsbyConfig, places: Collection[str]) -> dict[str, nn.Module]:
        found = super().saved_modules(config, places)
        if not config.train_layer_norms:
            return found
        for name, module in outside_slots(self.model):
            if not _is_norm(module) or name in places or any(is_within(name, saved) for saved in found):
                continue
            outer = [place for place in places if is_within(name, place)]
            if outer:
                raise ValueError(f"the norm {name!r} is in the target {outer[0]!r}: set train_layer_norms=False")
            found[name] = module
        return found

    def build(self, config: HoulsbyConfig, site: Site) -> nn.Module:
        inner, like = config.inner_width(site.width), site.like
        adapter = SimpleAdapter(
            site.width, inner, activation=config.non_linearity, device=like.device, dtype=like.dtype
        )
        init_normal(adapter, config.init_std, cut=2 * config.init_std)
        return adapter


@torch.no_grad()
def init_normal(adapter: nn.Module, std: float, cut: float = math.inf) -> None:
    """Draws weights from a normal distribution, cut off at ``cut``; biases become zero."""
    for name, parameter in adapter.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=std).clamp_(-cut, cut)


def _is_norm(module: nn.Module) -> bool:
    original = getattr(module, "original_module", module)
    return isinstance(original, nn.LayerNorm) or type(original).__name__.endswith(("RMSNorm", "LayerNorm"))


CONFIG_CLASSES[PeftType.HOULSBY] = HoulsbyConfig
TUNER_CLASSES[PeftType.HOULSBY] = HoulsbyModel
