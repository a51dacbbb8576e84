"""AdapterHub's configuration and weights as this library's: the method, its fields, and the keys of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.bottleneck_adapter import ACTIVATIONS
from peft_ext.serialization.adapterhub import Stored, StoredAdapter, StoredFusion, version_of
from peft_ext.tuners.adapterhub.layouts import (
    ATTENTION,
    MERGED,
    Layout,
    Place,
    Report,
    find_layout,
    fitting_shapes,
    place_names,
    target_pattern,
)
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType, TaskType
from peft_ext.tuners.hidden_prompt import COMBINE

Tensors = dict[str, Tensor]
_SHOWN = 3
_ACTIVATION_NAMES = {name: name for name in ACTIVATIONS} | {"swish": "silu"}
_BOTTLENECK_REASONS = {
    "is_parallel": "parallel adapters, which work on a sublayer's input",
    "use_gating": "gates",
    "ln_before": "a layer norm before the bottleneck",
    "ln_after": "a layer norm after the bottleneck",
    "inv_adapter": "invertible adapters behind the embeddings",
}
_LORA_REASONS = {
    "use_gating": "gates",
    "use_dora": "DoRA, whose norm leaves alpha / r out here and whose magnitude scales the bias too",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}
_TRAINING_ONLY = ("dropout", "stochastic_depth")
_OLD_LORA = (1, 1)
"""Until this version the scale of LoRA was 1 whatever alpha was; AdapterHub reads such files so too."""
LINEAR = {
    "adapter_down.0.weight": "down_proj.weight",
    "adapter_down.0.bias": "down_proj.bias",
    "adapter_up.weight": "up_proj.weight",
    "adapter_up.bias": "up_proj.bias",
}
PHM = {
    f"{theirs}.{factor}": f"{ours}.{factor}"
    for theirs, ours in {"adapter_down.0": "down", "adapter_up": "up"}.items()
    for factor in ("W_left", "W_right", "b")
}
_PROJECTIONS = ("adapter_down.0", "adapter_up")
_TASKS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
}


class Converted(NamedTuple):
    """An adapter in this library's terms.

    Args:
        config: the fields of ``adapter_config.json``.
        tensors: keyed as in ``adapter_model.safetensors``.
    """

    config: dict[str, Any]
    tensors: Tensors


class Source(NamedTuple):
    """What the readers of the methods need.

    Args:
        fields: AdapterHub's configuration of the method.
        tensors: keyed as in AdapterHub's file.
        name: the adapter's, which is in the keys.
        model_type, layout: the architecture.
        version: of AdapterHub, major and minor.
        num_layers: how many layers the model has; None: those up to the last that the adapter speaks of.
    """

    fields: dict[str, Any]
    tensors: Tensors
    name: str
    model_type: str
    layout: Layout
    version: tuple[int, int]
    num_layers: int | None


class Site(NamedTuple):
    """A module that has adapters: the list of layers, which of them, and the name within."""

    layers: str
    layer: int
    module: str


Sites = dict[Site, Tensors]


def from_adapterhub(
    stored: StoredAdapter | StoredFusion, report: Report | None = None, num_layers: int | None = None
) -> Converted:
    """The same adapter, or fusion of adapters, in this library's terms.

    Args:
        stored: as read from a folder.
        report: filled with what went over, and what could not; a new one by default.
        num_layers: how many layers the base model has: a file that lacks those of the last ones is told from one that
            leaves them out.

    Raises:
        ValueError: for what is unknown, incomplete, or has no counterpart; the message names all of it.
    """
    report = Report() if report is None else report
    with fitting_shapes():
        return _convert(stored, report, num_layers)


def _convert(stored: StoredAdapter | StoredFusion, report: Report, num_layers: int | None) -> Converted:
    if isinstance(stored, StoredFusion):
        config, tensors = _read_fusion(stored, report, num_layers)
        head = _common_head(stored, report)
        source = stored.fusion.config
    else:
        config, tensors = _read_adapter(stored.adapter, report, num_layers)
        head = stored.head
        source = stored.adapter.config
    config |= {"base_model_name_or_path": source.get("model_name") or None, "inference_mode": True}
    if head is not None:
        added, saved = _read_head(head, CONFIG_CLASSES[config["peft_type"]].checkpoint_prefix, report)
        config |= added
        tensors |= saved
    report.check()
    return Converted(config, tensors)


def _read_adapter(stored: Stored, report: Report, num_layers: int | None) -> Converted:
    config = stored.config
    name, model_type, fields = config.get("name"), config.get("model_type"), config.get("config")
    if not isinstance(name, str) or not name:
        raise ValueError(f"the adapter's name must be a string, got {name!r}")
    if not isinstance(fields, dict):
        raise ValueError(f"config must be an object with the method's fields, got {fields!r}")
    layout = find_layout(model_type)
    architecture = fields.get("architecture")
    if not isinstance(architecture, str | None) or architecture not in _READERS:
        known = ", ".join(map(repr, _READERS))
        raise ValueError(f"config.architecture is {architecture!r}, which is not supported: must be one of {known}")
    for field in _TRAINING_ONLY if architecture != "lora" else ():  # LoRA has its dropout here
        if fields.get(field):
            report.notes.append(f"{field} = {fields[field]} is left out: it has a part in training only")
    source = Source(fields, stored.tensors, name, str(model_type), layout, version_of(config), num_layers)
    return _READERS[architecture](source, report)


def _read_bottleneck(source: Source, report: Report) -> Converted:
    """Houlsby's, Pfeiffer's and Compacter's adapters are told apart by where they are and what they are made of."""
    fields = source.fields
    before, phm = _flag(fields, "original_ln_before", False), _flag(fields, "phm_layer", False)
    report.problems += _bottleneck_problems(fields, before, phm)
    report.check()
    sites, rest = _by_site(source, "adapters", source.name)
    places = _places(source, before)
    indices = _check_grid(source, sites, set(places))
    names = place_names(source.model_type)
    if any(names[place] is None for place in places.values()):
        report.problems.append("original_ln_before with mh_adapter: this architecture has no norm after attention")
        report.check()
    parts_of = {site: _fold_scaling(fields, parts, phm, report) for site, parts in sites.items()}
    ours = {site: _our_site(site, names[places[site.module]]) for site in sites}
    activation = _ACTIVATION_NAMES[str(fields.get("non_linearity")).lower()]
    config: dict[str, Any] = {"non_linearity": activation, "bottleneck_dim": _width(parts_of, phm)}
    tensors: Tensors = {}
    renamed = PHM if phm else LINEAR
    if phm:
        options, rule = _read_phm(source, parts_of, rest, report)
        config |= options
        if rule is None:
            renamed = PHM | {"phm_rule": "phm_rule"}
        else:  # the first adapter in the model has what all share
            first = min(sites, key=lambda site: (site.layer, places[site.module].sublayer))
            tensors[f"{ours[first]}.phm_rule"] = rule
    else:
        _refuse(rest)
    for site, parts in parts_of.items():
        complete = _complete(site, parts, renamed)
        tensors |= {f"{ours[site]}.adapter.{renamed[part]}": tensor for part, tensor in complete.items()}
    config |= _method(set(places.values()), before, phm)
    if not _is_default(config["peft_type"], set(places.values()), before):
        modules = [str(names[place]) for place in places.values()]
        config["target_modules"] = target_pattern(source.layout, indices, modules)
    elif _leave_out(fields):
        config["layers_to_transform"] = indices
    report.mapped.append((_bottleneck_name(fields), f"{config['peft_type']}, {len(sites)} adapters"))
    return Converted(config, tensors)


def _bottleneck_problems(fields: Mapping[str, Any], before: bool, phm: bool) -> list[str]:
    """Why the configuration has no counterpart."""
    problems = _reasons(fields, _BOTTLENECK_REASONS)
    activation = str(fields.get("non_linearity")).lower()
    if activation not in _ACTIVATION_NAMES:
        problems.append(f"non_linearity is {activation!r}: must be one of {', '.join(_ACTIVATION_NAMES)}")
    if not _flag(fields, "original_ln_after", True):
        problems.append("original_ln_after is false: the layer's own norm and residual are always applied here")
    if before and fields.get("residual_before_ln", True) is not True:
        problems.append(f"residual_before_ln is {fields['residual_before_ln']!r}: must be true here")
    if phm and not fields.get("factorized_phm_W", True):
        problems.append("factorized_phm_W is false: projections have factors of low rank here")
    if phm and fields.get("shared_W_phm", False):
        problems.append("shared_W_phm is true: adapters share A here, not their factors")
    return problems


def _places(source: Source, before: bool) -> dict[str, Place]:
    """The adapters' places by the module that holds them in AdapterHub."""
    holders = {"attention": ("mh_adapter", source.layout.attention), "ffn": ("output_adapter", source.layout.ffn)}
    return {
        module: Place(sublayer, before)
        for sublayer, (flag, module) in holders.items()
        if _flag(source.fields, flag, False)
    }


def _bottleneck_name(fields: Mapping[str, Any]) -> str:
    places = [name for name in ("mh_adapter", "output_adapter") if fields.get(name)]
    return f"bottleneck adapters ({'PHM, ' if fields.get('phm_layer') else ''}{', '.join(places)})"


def _method(places: set[Place], before: bool, phm: bool) -> dict[str, Any]:
    if phm:
        only_ffn = {place.sublayer for place in places} == {"ffn"}
        kind = PeftType.COMPACTER_PLUS_PLUS if only_ffn else PeftType.COMPACTER
        return {"peft_type": kind.value, "original_ln_before": before}
    if before:
        return {"peft_type": PeftType.PFEIFFER.value}
    return {"peft_type": PeftType.HOULSBY.value, "train_layer_norms": False}


def _is_default(peft_type: str, places: set[Place], before: bool) -> bool:
    """Whether the method's own default places are these."""
    only_ffn = {place.sublayer for place in places} == {"ffn"}
    if peft_type in (PeftType.PFEIFFER, PeftType.COMPACTER_PLUS_PLUS):
        return only_ffn
    return len(places) == len(("attention", "ffn")) and not before


def _read_phm(source: Source, sites: Sites, rest: Tensors, report: Report) -> tuple[dict[str, Any], Tensor | None]:
    """The fields of Compacter, and the A that all adapters share; None where each has its own, as a part."""
    fields = source.fields
    kept: dict[str, Any] = {name: fields[name] for name in ("phm_dim", "phm_rank", "phm_init_range") if name in fields}
    if fields.get("phm_bias") is False:
        _add_zero_biases(sites)
    if not _flag(fields, "shared_phm_rule", True):
        _refuse(rest)
        _join_rules(sites, report)
        return kept | {"shared_phm_rule": False}, None
    pattern = rf"(?:{re.escape(source.layout.base)}\.)?shared_parameters\.{re.escape(source.name)}\.(phm_rule\w*)"
    found = {match[1]: rest[key] for key in rest if (match := re.fullmatch(pattern, key))}
    _refuse([key for key in rest if not re.fullmatch(pattern, key)])
    if not fields.get("factorized_phm_rule", False):
        _require("shared_parameters", {"phm_rule"}, found)
        return kept, found["phm_rule"]
    _require("shared_parameters", {"phm_rule_left", "phm_rule_right"}, found)
    report.notes.append("factorized_phm_rule: A is kept as the product of its factors, and trains as a whole")
    return kept, torch.bmm(found["phm_rule_left"], found["phm_rule_right"])


def _join_rules(sites: Sites, report: Report) -> None:
    """An adapter's own A, where both of its projections have the same."""
    for parts in sites.values():
        down, up = (parts.pop(f"{projection}.phm_rule", None) for projection in _PROJECTIONS)
        if down is None or up is None:
            raise ValueError("shared_phm_rule is false, but the weights have no phm_rule for each projection")
        if not torch.equal(down, up):
            report.problems.append("shared_phm_rule is false: both projections of an adapter have one A here")
            report.check()
        parts["phm_rule"] = down


def _add_zero_biases(sites: Sites) -> None:
    for parts in sites.values():
        for projection in _PROJECTIONS:
            left, right = (parts.get(f"{projection}.{factor}") for factor in ("W_left", "W_right"))
            if left is not None and right is not None:
                parts[f"{projection}.b"] = right.new_zeros(left.size(0) * right.size(-1))


def _fold_scaling(fields: Mapping[str, Any], parts: Tensors, phm: bool, report: Report) -> Tensors:
    """Without AdapterHub's factor of an adapter's output: it is multiplied into the weights."""
    scaling = fields.get("scaling", 1.0)
    parts = dict(parts)
    learned = parts.pop("scaling", None)
    if scaling in ("learned", "channel"):
        if learned is None:
            raise ValueError(f"scaling is {scaling!r}, but the weights have no such tensor")
        factor = learned
    elif isinstance(scaling, int | float) and not isinstance(scaling, bool) and learned is None:
        factor = torch.tensor([float(scaling)])
    else:
        raise ValueError(f"scaling must be a number, 'learned' or 'channel', got {scaling!r}")
    if scaling == 1.0:
        return parts
    if phm and factor.numel() > 1:
        report.problems.append("scaling by channel has no counterpart in Compacter's factors")
        report.check()
    note = f"scaling = {scaling} is multiplied into the up projections, which so train at another rate"
    if note not in report.notes:
        report.notes.append(note)
    weight, bias = ("adapter_up.W_right", "adapter_up.b") if phm else ("adapter_up.weight", "adapter_up.bias")
    for name, value in ((weight, factor.view(-1, 1)), (bias, factor)):
        if name in parts:
            parts[name] = parts[name] * value
    return parts


def _width(sites: Sites, phm: bool) -> int:
    """The adapters' inner width."""
    weight, dimensions = ("adapter_up.W_left", (0, 1)) if phm else ("adapter_up.weight", (1,))
    for site, parts in sites.items():
        _require(f"layer {site.layer}, {site.module}", {weight}, parts)
    widths = {math.prod(parts[weight].size(dimension) for dimension in dimensions) for parts in sites.values()}
    if len(widths) != 1:
        raise ValueError(f"reduction_factor: adapters of several widths, {sorted(widths)}, cannot be one adapter here")
    return widths.pop()


def _read_lora(source: Source, report: Report) -> Converted:
    fields, layout = source.fields, source.layout
    report.problems += _reasons(fields, _LORA_REASONS)
    if fields.get("composition_mode", "add") != "add":
        report.problems.append(f"composition_mode is {fields['composition_mode']!r}: LoRA is added here")
    report.check()
    r, alpha = _size(fields, "r", 8), _number(fields, "alpha", 8)
    if source.version < _OLD_LORA and alpha != r:
        report.notes.append(f"alpha {alpha} becomes {r}: AdapterHub before 1.1 scaled by 1 whatever alpha was")
        alpha = r
    sites, rest = _by_site(source, "loras", source.name)
    _refuse(rest)
    used = {place: module for place, module in layout.lora.items() if _has_lora(fields, place)}
    indices = _check_grid(source, sites, set(used.values()))
    groups = [name in _attn_matrices(fields) for name in ATTENTION]
    tensors: Tensors = {}
    pattern = {}
    for site, parts in sites.items():
        lora_a, lora_b = _complete(site, parts, {"lora_A": "", "lora_B": ""}).values()
        copies = 1
        if site.module == layout.lora.get(MERGED):
            lora_b, copies = _spread(lora_b, groups), sum(groups)
            pattern[site.module] = copies
        _check_shape(f"{site.module}.lora_A", lora_a, 0, r * copies)
        _check_shape(f"{site.module}.lora_B", lora_b, 1, r * copies)
        tensors |= {f"{_our_site(site)}.lora_A.weight": lora_a, f"{_our_site(site)}.lora_B.weight": lora_b}
    config = {
        "peft_type": PeftType.LORA.value,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": fields.get("dropout", 0.0),
        "target_modules": target_pattern(layout, indices, list(used.values())),
    }
    if pattern:
        config |= {
            "rank_pattern": {module: r * copies for module, copies in pattern.items()},
            "alpha_pattern": {module: alpha * copies for module, copies in pattern.items()},
        }
        report.notes.append(f"{', '.join(pattern)}: one LoRA with blocks for q, k and v, whose zeros would train too")
    report.mapped.append((f"LoRA, r = {r}", f"LORA, {len(sites)} layers"))
    return Converted(config, tensors)


def _has_lora(fields: Mapping[str, Any], place: str) -> bool:
    chosen = _attn_matrices(fields)
    if place in ("intermediate", "output"):
        return bool(fields.get(f"{place}_lora", False))
    if not fields.get("selfattn_lora", True):
        return False
    return any(name in chosen for name in ATTENTION) if place == MERGED else place in chosen


def _attn_matrices(fields: Mapping[str, Any]) -> list[str]:
    value = fields.get("attn_matrices", ["q", "v"])
    if not isinstance(value, list):
        raise ValueError(f"attn_matrices must be a list of q, k and v, got {value!r}")
    return value


def _spread(lora_b: Tensor, groups: list[bool]) -> Tensor:
    """B of the groups ``[n out, r]`` as one ``[3 out, n r]``: each group's output reads its own part of A's."""
    count, rank = sum(groups), lora_b.size(1)
    if lora_b.size(0) % count:
        raise ValueError(f"lora_B of {count} matrices has shape {tuple(lora_b.shape)}")
    blocks = lora_b.view(count, -1, rank)
    whole = lora_b.new_zeros(len(groups), blocks.size(1), count, rank)
    for place, index in enumerate(index for index, enabled in enumerate(groups) if enabled):
        whole[index, :, place] = blocks[place]
    return whole.view(-1, count * rank)


def _read_prefix(source: Source, report: Report) -> Converted:
    fields, layout = source.fields, source.layout
    report.problems += _reasons(fields, {"use_gating": "gates that depend on the input"})
    if _leave_out(fields):
        report.problems.append("leave_out: a prefix is in every layer here")
    report.check()
    length = _size(fields, "prefix_length", 30)
    pattern = rf"(?:.+\.)?prefix_tunings\.{re.escape(source.name)}\.{layout.prefix}\.(.+)"
    # layers have copies of what the model holds once
    found = {match[1]: tensor for key, tensor in source.tensors.items() if (match := re.fullmatch(pattern, key))}
    _refuse([key for key in source.tensors if not re.fullmatch(pattern, key)])
    config: dict[str, Any] = {"peft_type": PeftType.PREFIX_TUNING.value, "num_virtual_tokens": length}
    if layout.shifts:
        config["shift_positions"] = False
        report.notes.append("outputs are AdapterHub's under 'eager' attention: its 'sdpa' masks text before the text")
    encoder: Tensors = {}
    if fields.get("flat", False):
        _require("prefix_tunings", {"control_trans"}, found)
        prompt = found["control_trans"]
        if prompt.numel() % length:
            raise ValueError(f"control_trans has {prompt.numel()} elements, which are no prefix of length {length}")
        prompt = prompt.reshape(length, -1)
    else:
        prompt, encoder = _project(source, found, report)
        _check_shape("wte.weight", prompt, 0, length)
    if encoder:
        config |= {"prefix_projection": True, "encoder_hidden_size": encoder["prompt_encoder.hidden.0.bias"].numel()}
    report.mapped.append((f"prefix tuning, {length} tokens", "PREFIX_TUNING"))
    return Converted(config, {"prompt_embeddings": prompt, **encoder})


def _project(source: Source, found: Tensors, report: Report) -> tuple[Tensor, Tensors]:
    """The prefix that AdapterHub's MLP makes, and the MLP, so that training can go on, where it is ours too."""
    layers = [f"control_trans.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]
    _require("prefix_tunings", {"wte.weight", *layers}, found)
    embedding, (w1, b1, w2, b2) = found["wte.weight"], (found[name] for name in layers)
    activation = str(source.fields.get("non_linearity", "tanh")).lower()
    name = _ACTIVATION_NAMES.get(activation)
    if name is None:
        report.problems.append(f"non_linearity is {activation!r}: must be one of {', '.join(_ACTIVATION_NAMES)}")
        report.check()
    prompt = F.linear(ACTIVATIONS[str(name)](F.linear(embedding, w1, b1)), w2, b2)
    width = embedding.size(1)
    heads_make_width = w2.size(0) % (2 * width) == 0 and not _has_fewer_key_heads(source, w2.size(0), width)
    if name != "tanh" or not heads_make_width:
        report.notes.append("the MLP that made the prefix is left out: training goes on with the plain prefix")
        return prompt, {}
    parts = {"embedding": embedding, "hidden.0.weight": w1, "hidden.0.bias": b1}
    for layer, (weight, bias) in enumerate(zip(w2.split(2 * width), b2.split(2 * width), strict=True)):
        parts |= {f"outputs.{layer}.weight": weight, f"outputs.{layer}.bias": bias}
    return prompt, {f"prompt_encoder.{name}": part for name, part in parts.items()}


def _has_fewer_key_heads(source: Source, features: int, width: int) -> bool:
    """Whether keys are narrower than the stream, which the copies of the prefix in the layers tell by their number."""
    copies = [re.match(r"(?:.+\.)?(\d+)\..*pool\.prefix_tunings", key) for key in source.tensors]
    layers = {int(match[1]) for match in copies if match}
    return bool(layers) and features != (max(layers) + 1) * 2 * width


def _read_prompt(source: Source, report: Report) -> Converted:
    combine = source.fields.get("combine", "prefix")
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}: must be one of {', '.join(COMBINE)}")
    pattern = rf"(?:.+\.)?prompt_tunings\.{re.escape(source.name)}\.(prompt_embedding\.weight)"
    found = {match[1]: tensor for key, tensor in source.tensors.items() if (match := re.fullmatch(pattern, key))}
    _refuse([key for key in source.tensors if not re.fullmatch(pattern, key)])
    _require("prompt_tunings", {"prompt_embedding.weight"}, found)
    prompt = found["prompt_embedding.weight"]
    length = _size(source.fields, "prompt_length", 10)
    _check_shape("prompt_embedding.weight", prompt, 0, length)
    report.mapped.append((f"prompt tuning, {length} tokens", "HIDDEN_PROMPT"))
    config = {"peft_type": PeftType.HIDDEN_PROMPT.value, "num_virtual_tokens": length, "combine": combine}
    return Converted(config, {"prompt_embeddings": prompt})


_READERS: dict[Any, Callable[[Source, Report], Converted]] = {
    None: _read_bottleneck,
    "lora": _read_lora,
    "prefix_tuning": _read_prefix,
    "prompt_tuning": _read_prompt,
}


def _read_fusion(stored: StoredFusion, report: Report, num_layers: int | None) -> Converted:
    members = {name: _read_adapter(adapter.adapter, report, num_layers) for name, adapter in stored.adapters.items()}
    for name, member in members.items():
        if member.config["peft_type"] not in (PeftType.HOULSBY, PeftType.PFEIFFER):
            report.problems.append(f"adapter {name!r} is of peft_type {member.config['peft_type']}, which is not fused")
    fields = stored.fusion.config.get("config")
    if not isinstance(fields, dict):
        raise ValueError(f"the fusion's config must be an object, got {fields!r}")
    wanted = {"query": True, "key": True, "query_before_ln": False, "residual_before": False, "temperature": False}
    for name, value in wanted.items():
        if fields.get(name, value) is not value:
            report.problems.append(f"the fusion's {name} is {fields[name]!r}: must be {value} here")
    report.check()
    first = next(iter(stored.adapters.values())).adapter.config
    fusion_name, layout = str(stored.fusion.config.get("name")), find_layout(first.get("model_type"))
    source = Source(fields, stored.fusion.tensors, fusion_name, first["model_type"], layout, (1, 0), num_layers)
    sites, rest = _by_site(source, "adapter_fusion_layer", fusion_name)
    _refuse(rest)
    tensors = {
        re.sub(r"\.adapter\.", f".adapter.adapters.{index}.", key): tensor
        for index, member in enumerate(members.values())
        for key, tensor in member.tensors.items()
    }
    before = next(iter(members.values())).config["peft_type"] == PeftType.PFEIFFER
    names = place_names(source.model_type)
    ours = {layout.attention: names[Place("attention", before)], layout.ffn: names[Place("ffn", before)]}
    parts = {f"{layer}.{kind}" for layer in ("query", "key") for kind in ("weight", "bias")}
    for site, found in sites.items():
        if not fields.get("value", True):
            _require(f"layer {site.layer}, {site.module}", parts, found)
            found["value.weight"] = torch.eye(found["query.weight"].size(0), dtype=found["query.weight"].dtype)
        complete = _complete(site, found, dict.fromkeys(sorted(parts | {"value.weight"})))
        place = _our_site(site, ours.get(site.module))
        tensors |= {f"{place}.adapter.fusion.{part}": tensor for part, tensor in complete.items()}
    if not fields.get("value", True):
        report.notes.append("the fusion has no value matrix: it is the identity here, and would train")
    report.mapped.append((f"fusion of {', '.join(members)}", f"ADAPTER_FUSION, {len(sites)} places"))
    config = {
        "peft_type": PeftType.ADAPTER_FUSION.value,
        "adapters": list(members),
        "adapter_configs": [member.config for member in members.values()],
        "regularisation": 0.01 if fields.get("regularization", True) else 0.0,
    }
    return Converted(config, tensors)


def _common_head(stored: StoredFusion, report: Report) -> Stored | None:
    """The head that a setup's adapters have: a model with a static head saves it with each of them."""
    heads = [adapter.head for adapter in stored.adapters.values() if adapter.head is not None]
    for head in heads[1:]:
        same = head.tensors.keys() == heads[0].tensors.keys() and all(
            torch.equal(tensor, heads[0].tensors[key]) for key, tensor in head.tensors.items()
        )
        if not same:
            report.problems.append("the fused adapters have heads of their own, of which a model can have but one")
    return heads[0] if heads else None


def _read_head(head: Stored, prefix: str, report: Report) -> tuple[dict[str, Any], Tensors]:
    """A static head becomes modules that are saved with the adapter, as in Hugging Face PEFT."""
    if is_flexible(head):
        kind = head.config["config"].get("head_type") if isinstance(head.config["config"], dict) else None
        report.problems.append(f"the prediction head {head.config.get('name')!r} ({kind}) is no transformers model's")
        return {}, {}
    modules = head_modules(head)
    model_class = str(head.config.get("model_class"))
    task = next((task.value for suffix, task in _TASKS.items() if model_class.endswith(suffix)), None)
    report.mapped.append((f"head of {model_class}", f"modules_to_save: {', '.join(modules)}"))
    tensors = {f"{prefix}{key}": tensor for key, tensor in head.tensors.items()}
    return {"modules_to_save": modules, "task_type": task}, tensors


def is_flexible(head: Stored) -> bool:
    """Whether a head is one of AdapterHub's own, rather than that of a transformers model."""
    return head.config.get("config") is not None


def head_modules(head: Stored) -> list[str]:
    """The modules of a transformers model that a static head consists of."""
    return list(dict.fromkeys(key.partition(".")[0] for key in head.tensors))


def _by_site(source: Source, holder: str, name: str) -> tuple[Sites, Tensors]:
    """The tensors by the module that holds them, and the others."""
    layout = source.layout
    layers = rf"(?P<layers>(?:{re.escape(layout.base)}\.)?{re.escape(layout.layers)})"
    pattern = re.compile(rf"{layers}\.(?P<index>\d+)\.(?P<module>.+)\.{holder}\.{re.escape(name)}\.(?P<part>.+)")
    sites: Sites = {}
    rest = {}
    for key, tensor in source.tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            rest[key] = tensor
            continue
        site = Site(match["layers"], int(match["index"]), match["module"])
        sites.setdefault(site, {})[match["part"]] = tensor
    if not sites:
        raise ValueError(f"the weights have no {holder} of {name!r} in a {source.model_type} model{_shown(rest)}")
    return sites, rest


def _check_grid(source: Source, sites: Iterable[Site], modules: set[str]) -> list[int]:
    """The layers that have adapters; a ValueError unless these are all but those left out, each with all modules."""
    found = {(site.layer, site.module) for site in sites}
    left_out = set(_leave_out(source.fields))
    count = source.num_layers or max([index for index, _ in found] + list(left_out)) + 1
    indices = [index for index in range(count) if index not in left_out]
    wanted = {(index, module) for index in indices for module in modules}
    if found != wanted:
        layers = [f"{index}.{module}" for index, module in sorted(found ^ wanted)]
        raise ValueError(
            f"the weights are not those of the configuration: it does not agree on layers {layers[:_SHOWN]}"
        )
    return indices


def _leave_out(fields: Mapping[str, Any]) -> list[int]:
    value = fields.get("leave_out") or []
    if not isinstance(value, list) or not all(isinstance(index, int) and index >= 0 for index in value):
        raise ValueError(f"leave_out must be a list of layers' indices, got {value!r}")
    return value


def _our_site(site: Site, module: str | None = None) -> str:
    """The key in a checkpoint of this library's before the adapter's own part."""
    name = site.module if module is None else module
    return f"base_model.model.{site.layers}.{site.layer}" + (f".{name}" if name else "")


def _complete(site: Site, parts: Tensors, wanted: Mapping[str, Any]) -> Tensors:
    """The parts in the order of ``wanted``; a ValueError if any is missing or unexpected."""
    _require(f"layer {site.layer}, {site.module}", set(wanted), parts)
    _refuse([part for part in parts if part not in wanted])
    return {part: parts[part] for part in wanted}


def _require(where: str, wanted: set[str], found: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted - found.keys())
    if missing:
        raise ValueError(f"the weights miss {', '.join(missing[:_SHOWN])} in {where}")


def _refuse(keys: Iterable[str]) -> None:
    names = sorted(keys)
    if names:
        raise ValueError(f"the weights have unexpected keys{_shown(names)}")


def _shown(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f": {', '.join(names[:_SHOWN])}{more}" if names else ""


def _check_shape(name: str, tensor: Tensor, dimension: int, size: int) -> None:
    if tensor.dim() != 2 or tensor.size(dimension) != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: dimension {dimension} must be {size}")


def _reasons(fields: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    return [f"{name} is {fields[name]!r}: {reason}" for name, reason in reasons.items() if fields.get(name)]


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _number(fields: Mapping[str, Any], name: str, default: int) -> Any:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a number > 0, got {value!r}")
    return value


def _size(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = _number(fields, name, default)
    if not isinstance(value, int):
        raise ValueError(f"{name} must be an integer > 0, got {value!r}")
    return value
