"""This library's adapters, and Hugging Face PEFT's, as AdapterHub's configuration and weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext.serialization.adapterhub import WRITTEN_VERSION, Stored, StoredAdapter, StoredFusion
from peft_ext.tuners.adapterhub.layouts import (
    ATTENTION,
    LAYOUTS,
    MERGED,
    BaseModel,
    Layout,
    Place,
    Report,
    fitting_shapes,
    place_names,
)
from peft_ext.tuners.adapterhub.reading import LINEAR, PHM, head_modules
from peft_ext.tuners.compacter import CompacterConfig
from peft_ext.tuners.config import PeftConfig, PeftType, TargetedConfig, TaskType
from peft_ext.tuners.fusion import AdapterFusionConfig
from peft_ext.tuners.hidden_prompt import HiddenPromptConfig
from peft_ext.tuners.houlsby import HoulsbyConfig
from peft_ext.tuners.lora import LoraConfig
from peft_ext.tuners.prefix_tuning import PrefixTuningConfig
from peft_ext.tuners.prompt_learning import has_closed_tokens
from peft_ext.tuners.state_dict import PROMPT_ENCODER
from peft_ext.tuners.sublayer_tuner import SublayerConfig
from peft_ext.tuners.targets import find_pattern_value

Tensors = dict[str, Tensor]
_SHOWN = 3
_NO_COUNTERPART = {
    PeftType.LOKR: "AdapterHub has no Kronecker products in place of LoRA",
    PeftType.PROMPT_TUNING: "AdapterHub's prompts come after the embeddings' positions and norm (HiddenPromptConfig)",
    PeftType.P_TUNING: "AdapterHub's prompts come after the embeddings' positions and norm (HiddenPromptConfig)",
    PeftType.BITFIT: "AdapterHub does not save biases of the model",
    PeftType.SIDE_TUNING: "AdapterHub has no side networks",
}
_BOTTLENECK: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_FUSION = {
    "dropout_prob": None,
    "key": True,
    "query": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}
_ACTIVATION_NAMES = {"silu": "swish"}
_STEMS = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
}
_SUFFIXES = {
    TaskType.SEQ_CLS: "ForSequenceClassification",
    TaskType.TOKEN_CLS: "ForTokenClassification",
    TaskType.QUESTION_ANS: "ForQuestionAnswering",
    TaskType.CAUSAL_LM: "ForCausalLM",
}


class Target(NamedTuple):
    """What the writers of the methods need.

    Args:
        name: the adapter's.
        tensors: keyed as in ``adapter_model.safetensors``; without the head's.
        base: the base model.
        layout: its architecture.
    """

    name: str
    tensors: Tensors
    base: BaseModel
    layout: Layout


class Site(NamedTuple):
    """A module with an adapter: index of the layer, and name within."""

    layer: int
    module: str


Sites = dict[Site, Tensors]


def to_adapterhub(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
    base: BaseModel | None = None,
    report: Report | None = None,
) -> StoredAdapter | StoredFusion:
    """The same adapter, or fusion of adapters, in AdapterHub's terms.

    Args:
        values: the fields of ``adapter_config.json``.
        tensors: keyed as in ``adapter_model.safetensors``.
        name: the adapter's, in AdapterHub.
        base: the base model; by default it is read off the keys, which prefixes and prompts do not have.
        report: filled with what went over, and what could not; a new one by default.

    Raises:
        ValueError, TypeError: for what is unknown, incomplete, or has no counterpart; the message names all of it.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name {name!r} is empty, reserved, or has a dot: no adapter of AdapterHub's can have it")
    report = Report() if report is None else report
    config = PeftConfig.from_dict(dict(values))
    assert isinstance(config.peft_type, PeftType)
    if config.peft_type in _NO_COUNTERPART:
        report.problems.append(f"peft_type {config.peft_type.value}: {_NO_COUNTERPART[config.peft_type]}")
        report.check()
    if base is None:
        base = infer_base(tensors)
        _note_namesakes(base, report)
    base = base._replace(name=config.base_model_name_or_path or base.name)
    layout = LAYOUTS[base.model_type]
    head, own = _split_head(config, tensors, layout, report)
    target = Target(name, own, base, layout)
    stored_head = _write_head(config, head, base, report) if head else None
    with fitting_shapes():
        return _write(config, target, stored_head, report)


def _write(
    config: PeftConfig, target: Target, stored_head: Stored | None, report: Report
) -> StoredAdapter | StoredFusion:
    if isinstance(config, AdapterFusionConfig):
        fusion = _write_fusion(config, target, report)
        report.check()
        adapters = {name: StoredAdapter(adapter, stored_head) for name, adapter in fusion.adapters.items()}
        return StoredFusion(fusion.fusion, adapters)
    adapter = _write_adapter(config, target, report)
    report.check()
    return StoredAdapter(adapter, stored_head)


def infer_base(tensors: Mapping[str, Tensor]) -> BaseModel:
    """What the keys of a checkpoint tell of the base model; a ValueError if that is not enough."""
    for model_type, layout in LAYOUTS.items():
        pattern = re.compile(rf"base_model\.model\.{re.escape(f'{layout.base}.{layout.layers}')}\.\d+\.")
        keys = [key for key in tensors if pattern.match(key)]
        width = next((width for key in keys if (width := _input_width(key, tensors[key], layout))), None)
        if width is not None:
            return BaseModel(model_type, width)
    raise ValueError("the adapter's tensors do not tell its base model: name the base model (--base)")


def _note_namesakes(base: BaseModel, report: Report) -> None:
    same = [kind for kind, layout in LAYOUTS.items() if layout == LAYOUTS[base.model_type] and kind != base.model_type]
    if same:
        report.notes.append(
            f"the names of the tensors are those of a {base.model_type} model, and of {', '.join(same)}: name the base "
            "model (--base) if it is one of these, or AdapterHub leaves a head out"
        )


def _input_width(key: str, tensor: Tensor, layout: Layout) -> int | None:
    """Features of the model, where a tensor has them."""
    attention = tuple(f".{layout.lora[place]}.lora_A.weight" for place in (*ATTENTION, MERGED) if place in layout.lora)
    if key.endswith(attention) or re.search(r"\.adapter\.(adapters\.\d+\.)?down_proj\.weight$", key):
        return tensor.size(-1)
    return tensor.size(0) * tensor.size(1) if key.endswith(".adapter.down.W_left") else None


def _write_adapter(config: PeftConfig, target: Target, report: Report) -> Stored:
    for kind, write in _WRITERS.items():
        if isinstance(config, kind):
            fields, tensors = write(config, target, report)
            break
    return Stored(_describe(target.base, target.name) | {"config": fields}, tensors)


def _describe(base: BaseModel, name: str | None) -> dict[str, Any]:
    return {
        "hidden_size": base.hidden_size,
        "model_class": base.model_class,
        "model_name": base.name,
        "model_type": base.model_type,
        "name": name,
        "version": WRITTEN_VERSION,
    }


def _write_bottleneck(config: SublayerConfig, target: Target, report: Report) -> tuple[dict[str, Any], Tensors]:
    phm = isinstance(config, CompacterConfig)
    before = config.original_ln_before if isinstance(config, CompacterConfig) else not isinstance(config, HoulsbyConfig)
    sites = _by_site(target, r"adapter\..+|phm_rule", report)
    shared = [parts.pop("phm_rule") for parts in sites.values() if "phm_rule" in parts]
    names = _places(target, before)
    indices, modules = _grid(sites, names, report)
    if config.adapter_drop is not None and config.adapter_drop.mode == "robust":
        report.notes.append("adapter_drop of mode 'robust' is left out: it has a part in training only")
    sublayers = {names[module].sublayer for module in modules}
    fields = _BOTTLENECK | {
        "leave_out": _left_out(config, target.base, indices, report),
        "mh_adapter": "attention" in sublayers,
        "non_linearity": _ACTIVATION_NAMES.get(config.non_linearity, config.non_linearity),
        "original_ln_before": before,
        "output_adapter": "ffn" in sublayers,
    }
    theirs = {f"adapter.{ours}": [name] for name, ours in (PHM if phm else LINEAR).items()}
    tensors: Tensors = {}
    if isinstance(config, CompacterConfig):
        if config.terms != config.phm_dim:
            report.problems.append(f"num_kron_terms is {config.terms}: AdapterHub has phm_dim terms ({config.phm_dim})")
        fields |= {name: getattr(config, name) for name in ("phm_dim", "phm_rank", "phm_init_range", "shared_phm_rule")}
        fields["phm_layer"] = True
        if len(shared) != config.shared_phm_rule:
            raise ValueError(f"shared_phm_rule is {config.shared_phm_rule}, but the weights have {len(shared)} for all")
        if shared:
            tensors[f"{target.layout.base}.shared_parameters.{target.name}.phm_rule"] = shared[0]
        else:
            theirs["adapter.phm_rule"] = ["adapter_down.0.phm_rule", "adapter_up.phm_rule"]
    hidden, inner = target.base.hidden_size, _inner_width(sites, phm)
    for site, parts in sites.items():
        _require(site, set(theirs), parts)
        _check_shapes(site, parts, _shapes(hidden, inner, phm))
        key = f"{_holder(target, site, names)}.adapters.{target.name}"
        tensors |= {f"{key}.{name}": tensor for part, tensor in parts.items() for name in theirs[part]}
    fields["reduction_factor"] = _reduction_factor(hidden, inner)
    places = ", ".join(sorted(sublayers))
    report.mapped.append((PeftType(config.peft_type).value, f"bottleneck adapters ({places})"))
    return fields, tensors


def _holder(target: Target, site: Site, names: Mapping[str, Place]) -> str:
    """The module that holds adapters in AdapterHub, where ours are at ``site``."""
    in_attention = names[site.module].sublayer == "attention"
    return _module(target, site.layer, target.layout.attention if in_attention else target.layout.ffn)


def _places(target: Target, before: bool) -> dict[str, Place]:
    """AdapterHub's places by the name of our target module."""
    names = place_names(target.base.model_type)
    return {name: place for place, name in names.items() if place.before == before and name is not None}


def _inner_width(sites: Sites, phm: bool) -> int:
    name = "adapter.down.b" if phm else "adapter.down_proj.bias"
    widths = {parts[name].numel() for parts in sites.values() if name in parts}
    if len(widths) != 1:
        raise ValueError(f"the adapters must be of one inner width, got {sorted(widths)}")
    return widths.pop()


def _reduction_factor(hidden: int, inner: int) -> float:
    """What AdapterHub divides the width by, and rounds down, to get ``inner``."""
    if hidden % inner == 0:
        return hidden // inner
    factor = hidden / inner
    return factor if hidden // factor == inner else math.nextafter(factor, 0)


def _write_lora(config: LoraConfig, target: Target, report: Report) -> tuple[dict[str, Any], Tensors]:
    for name, why in (("use_dora", "AdapterHub's DoRA is another"), ("bias", "AdapterHub does not save the model's")):
        if getattr(config, name) not in (False, "none"):
            report.problems.append(f"{name} is {getattr(config, name)!r}: {why}")
    report.check()
    layout = target.layout
    sites = _by_site(target, r"lora_[AB]\.weight", report)
    indices, modules = _grid(sites, {module: place for place, module in layout.lora.items()}, report)
    for site, parts in sites.items():
        _require(site, {"lora_A.weight", "lora_B.weight"}, parts)
        rank, rows = parts["lora_A.weight"].size(0), parts["lora_B.weight"].size(0)
        _check_shapes(site, parts, {"lora_A.weight": (rank, -1), "lora_B.weight": (rows, rank)})
    merged = {site: parts for site, parts in sites.items() if site.module == layout.lora.get(MERGED)}
    groups = _common_groups(merged.values())
    factors = {site: _grouped(parts, groups) if site in merged else _plain(parts) for site, parts in sites.items()}
    r = max(lora_b.size(1) for _, lora_b in factors.values())
    scales = {site: _scale(config, site, parts, target) for site, parts in sites.items()}
    scale = next(iter(scales.values()))
    if len(set(scales.values())) > 1:
        report.notes.append("layers of another alpha / r have the difference in B, which so trains at another rate")
    if any(lora_b.size(1) < r for _, lora_b in factors.values()):
        report.notes.append(f"layers of lower rank are filled up with zeros to r = {r}, which stay zero in training")
    tensors: Tensors = {}
    for site, (lora_a, lora_b) in factors.items():
        if scale != scales[site]:
            lora_b = lora_b * (scales[site] / scale)
        missing = r - lora_b.size(1)
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)).flatten(0, 1), F.pad(lora_b, (0, missing))
        key = f"{_module(target, site.layer, site.module)}.loras.{target.name}"
        tensors |= {f"{key}.lora_A": lora_a, f"{key}.lora_B": lora_b}
    places = [place for place, module in layout.lora.items() if module in modules]
    attention = [place for place in places if place in ATTENTION]
    if groups is not None:
        attention = [place for place, changed in zip(ATTENTION, groups, strict=True) if changed]
    elif merged:
        attention = list(ATTENTION)
        report.notes.append("the A of q, k and v are copies of one, which train apart")
    alpha = scale * r
    report.mapped.append((f"LORA, {len(sites)} layers", f"LoRA, r = {r}, in {', '.join(places)}"))
    fields = {
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "architecture": "lora",
        "attn_matrices": attention,
        "composition_mode": "add",
        "dropout": float(config.lora_dropout),
        "dtype": None,
        "init_weights": "lora",
        "init_weights_seed": None,
        "intermediate_lora": "intermediate" in places,
        "leave_out": _left_out(config, target.base, indices, report),
        "output_lora": "output" in places,
        "r": r,
        "selfattn_lora": bool(set(places) & {*ATTENTION, MERGED}),
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
    }
    return fields, tensors


def _plain(parts: Tensors) -> tuple[Tensor, Tensor]:
    """A as ``[1, r, in]``, and B."""
    return parts["lora_A.weight"][None], parts["lora_B.weight"]


def _grouped(parts: Tensors, groups: Sequence[bool] | None) -> tuple[Tensor, Tensor]:
    """A ``[n, r, in]`` and B ``[n out, r]`` of the n of q, k and v that change; without groups all have the same A."""
    lora_a, lora_b = parts["lora_A.weight"], parts["lora_B.weight"]
    if groups is None:
        return lora_a.expand(len(ATTENTION), *lora_a.shape), lora_b
    count = sum(groups)
    blocks = lora_b.reshape(len(ATTENTION), -1, count, lora_b.size(1) // count)[list(groups)]
    return lora_a.reshape(count, -1, lora_a.size(1)), torch.cat([block[:, place] for place, block in enumerate(blocks)])


def _common_groups(merged: Iterable[Tensors]) -> tuple[bool, ...] | None:
    """Which of q, k and v the LoRAs for all three change, each by a part of A of its own, as in AdapterHub.

    None if they are of another kind, or there are none.
    """
    found = {_groups(parts["lora_B.weight"]) for parts in merged}
    return found.pop() if len(found) == 1 else None


def _groups(lora_b: Tensor) -> tuple[bool, ...] | None:
    changed = [bool(rows.any()) for rows in lora_b.chunk(len(ATTENTION))]
    count = sum(changed)
    if not count or lora_b.size(1) % count:
        return None
    blocks = lora_b.reshape(len(ATTENTION), -1, count, lora_b.size(1) // count)[changed]
    apart = not any(blocks[row, :, column].any() for row in range(count) for column in range(count) if row != column)
    return tuple(changed) if apart else None


def _scale(config: LoraConfig, site: Site, parts: Tensors, target: Target) -> float:
    name = f"{target.layout.base}.{target.layout.layers}.{site.layer}.{site.module}"
    alpha, r = find_pattern_value(config.alpha_pattern, name, config.lora_alpha), parts["lora_A.weight"].size(0)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def _write_prefix(config: PrefixTuningConfig, target: Target, report: Report) -> tuple[dict[str, Any], Tensors]:
    if target.layout.shifts and config.shift_positions:
        report.problems.append("a prefix that moves a decoder's text on: AdapterHub's leaves it at position 0")
    prompt = _prompt(target)
    length = prompt.size(0)
    if has_closed_tokens(config, prompt):
        report.problems.append("gated: AdapterHub cannot leave out the tokens whose gate is closed")
    encoder = {key.removeprefix(PROMPT_ENCODER): value for key, value in target.tensors.items() if "encoder" in key}
    hidden = encoder.get("hidden.0.bias")
    projected = hidden is not None and encoder["embedding"].size(1) == target.base.hidden_size
    if config.prefix_projection and not projected:
        report.notes.append("the plain prefix is written, without the MLP that made it")
    fields = {
        "architecture": "prefix_tuning",
        "bottleneck_size": hidden.numel() if projected and hidden is not None else 512,
        "cross_prefix": True,
        "dropout": 0.0,
        "encoder_prefix": True,
        "flat": not projected,
        "init_weights_seed": None,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": length,
        "shared_gating": True,
        "use_gating": False,
    }
    key = f"{target.layout.base}.prefix_tuning.prefix_tunings.{target.name}.{target.layout.prefix}"
    report.mapped.append(("PREFIX_TUNING", f"prefix tuning, {length} tokens"))
    if not projected:
        return fields, {f"{key}.control_trans": prompt.flatten()}
    outputs = [
        torch.cat([encoder[f"outputs.{layer}.{kind}"] for layer in range(_count(encoder))])
        for kind in ("weight", "bias")
    ]
    return fields, {
        f"{key}.wte.weight": encoder["embedding"],
        f"{key}.control_trans.0.weight": encoder["hidden.0.weight"],
        f"{key}.control_trans.0.bias": encoder["hidden.0.bias"],
        f"{key}.control_trans.2.weight": outputs[0],
        f"{key}.control_trans.2.bias": outputs[1],
    }


def _prompt(target: Target) -> Tensor:
    if "prompt_embeddings" not in target.tensors:
        raise ValueError("the weights miss prompt_embeddings")
    prompt = target.tensors["prompt_embeddings"]
    if prompt.dim() != 2:
        raise ValueError(f"prompt_embeddings has shape {tuple(prompt.shape)}: must be [tokens, features]")
    return prompt


def _count(encoder: Collection[str]) -> int:
    """How many layers the MLP has outputs for."""
    return sum(name.startswith("outputs.") and name.endswith(".weight") for name in encoder)


def _write_prompt(config: HiddenPromptConfig, target: Target, report: Report) -> tuple[dict[str, Any], Tensors]:
    prompt = _prompt(target)
    fields = {
        "architecture": "prompt_tuning",
        "combine": config.combine,
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
        "prompt_length": prompt.size(0),
    }
    report.mapped.append(("HIDDEN_PROMPT", f"prompt tuning, {prompt.size(0)} tokens"))
    key = f"{target.layout.base}.prompt_tuning.prompt_tunings.{target.name}.prompt_embedding.weight"
    return fields, {key: prompt}


_WRITERS: dict[type[PeftConfig], Callable[[Any, Target, Report], tuple[dict[str, Any], Tensors]]] = {
    SublayerConfig: _write_bottleneck,
    LoraConfig: _write_lora,
    PrefixTuningConfig: _write_prefix,
    HiddenPromptConfig: _write_prompt,
}


class _Fusion(NamedTuple):
    fusion: Stored
    adapters: dict[str, Stored]


def _write_fusion(config: AdapterFusionConfig, target: Target, report: Report) -> _Fusion:
    members = [member for _, member in config.named_adapters()]
    names = fusion_names([name for name, _ in config.named_adapters()])
    adapters = {}
    for index, (name, member) in enumerate(zip(names, members, strict=True)):
        marker = f".adapter.adapters.{index}."
        own = {key.replace(marker, ".adapter."): t for key, t in target.tensors.items() if marker in key}
        adapters[name] = _write_adapter(member, target._replace(name=name, tensors=own), report)
    before = not isinstance(members[0], HoulsbyConfig)
    places = _places(target, before)
    joined = ",".join(names)
    parts = {f"{layer}.{kind}" for layer in ("query", "key") for kind in ("weight", "bias")} | {"value.weight"}
    tensors: Tensors = {}
    fused = {key: tensor for key, tensor in target.tensors.items() if ".adapter.fusion." in key}
    for site, found in _by_site(target._replace(tensors=fused), r"adapter\.fusion\..+", report).items():
        found = {part.removeprefix("adapter.fusion."): tensor for part, tensor in found.items()}
        _require(site, parts, found)
        key = f"{_holder(target, site, places)}.adapter_fusion_layer.{joined}"
        tensors |= {f"{key}.{part}": tensor for part, tensor in found.items()}
    fields = _FUSION | {"regularization": config.regularisation > 0}
    report.mapped.append(("ADAPTER_FUSION", f"fusion of {', '.join(names)}"))
    described = _describe(target.base, joined) | {"adapter_names": names, "config": fields}
    return _Fusion(Stored(described, tensors), adapters)


def fusion_names(paths: Sequence[str]) -> list[str]:
    """Names for fused adapters: the last parts of their folders' names, made valid and told apart.

    Example:
        >>> fusion_names(["runs/a.b", "other/a.b", "c"])
        ['a_b', 'a_b_1', 'c']
    """
    names: list[str] = []
    for index, path in enumerate(paths):
        name = re.sub(r"\W", "_", re.split(r"[/\\]", path.rstrip("/\\"))[-1]) or "adapter"
        names.append(f"{name}_{index}" if name in names else name)
    return names


def _split_head(
    config: PeftConfig, tensors: Mapping[str, Tensor], layout: Layout, report: Report
) -> tuple[Tensors, Tensors]:
    """The tensors of the model's head, without the keys' prefix, and those of the adapter."""
    prefix, base = config.checkpoint_prefix, f"{layout.base}."
    named = getattr(config, "modules_to_save", None) or []
    head, own, trained = {}, {}, []
    for key, tensor in tensors.items():
        path = key.removeprefix(prefix)
        if _is_adapters(path):
            own[key] = tensor
        elif path != key and not path.startswith((base, f"{layout.layers}.")) and _is_named(path, named):
            head[path] = tensor
        else:
            trained.append(path)
    if trained:
        shown = ", ".join(trained[:_SHOWN])
        report.problems.append(
            f"{len(trained)} tensors that the adapter trains in the model itself, such as {shown}: AdapterHub saves "
            "adapters and heads only"
        )
    return head, own


def _is_named(path: str, names: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` names the outermost module of a path: the end of a name is enough."""
    return path.partition(".")[0].endswith(tuple(names))


def _is_adapters(path: str) -> bool:
    own = r"(?:.+\.)?(?:adapter\..+|phm_rule|lora_[A-Za-z_]+(?:\.weight)?|prompt_embeddings|prompt_encoder\..+)"
    return re.fullmatch(own, path) is not None


def _write_head(config: PeftConfig, head: Tensors, base: BaseModel, report: Report) -> Stored:
    mapping = config.auto_mapping or {}
    # the base model's own class is last: what is fine-tuned is mostly the body of a checkpoint with another head
    model_class = mapping.get("base_model_class") or _class_of(base.model_type, config.task_type) or base.model_class
    if model_class is None:
        report.problems.append("the head's model class is not known: the adapter has neither a task_type nor a class")
    outputs = next((tensor.size(0) for name, tensor in reversed(head.items()) if name.endswith("weight")), None)
    described = _describe(base._replace(model_class=model_class), None)
    stored = Stored(described | {"config": None, "label2id": None, "num_labels": outputs}, dict(head))
    report.mapped.append((f"modules_to_save: {', '.join(head_modules(stored))}", f"head of {model_class}"))
    return stored


def _class_of(model_type: str, task: str | None) -> str | None:
    if task is None or TaskType(task) not in _SUFFIXES:
        return None
    if model_type == "gpt2" and task == TaskType.CAUSAL_LM:
        return "GPT2LMHeadModel"
    return _STEMS[model_type] + _SUFFIXES[TaskType(task)]


def _by_site(target: Target, part: str, report: Report) -> Sites:
    """The adapter's tensors by the module that they belong to; ``part`` matches what follows its name."""
    layers = rf"base_model\.model\.(?:{re.escape(target.layout.base)}\.)?{re.escape(target.layout.layers)}"
    pattern = re.compile(rf"{layers}\.(\d+)(?:\.(.+?))??\.({part})")
    sites: Sites = {}
    strange = []
    for key, tensor in target.tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        sites.setdefault(Site(int(match[1]), match[2] or ""), {})[match[3]] = tensor
    if strange or not sites:
        shown = ", ".join(strange[:_SHOWN]) or "none"
        report.problems.append(
            f"adapters that are not in the layers of a {target.base.model_type} model ({shown}): AdapterHub has no "
            "place for them"
        )
        report.check()
    return sites


def _grid(sites: Iterable[Site], known: Collection[str], report: Report) -> tuple[list[int], set[str]]:
    """The layers and the modules that have adapters; AdapterHub has the same modules in each of the layers."""
    found = set(sites)
    modules = {site.module for site in found}
    unknown = sorted(modules - set(known))
    if unknown:
        report.problems.append(f"adapters at {', '.join(unknown)}: AdapterHub has no place for them there")
    indices = sorted({site.layer for site in found})
    uneven = sorted({(index, module) for index in indices for module in modules} - found)
    if uneven:
        report.problems.append(f"layer {uneven[0][0]} has no adapter at {uneven[0][1]}: AdapterHub's are alike in all")
    report.check()
    return indices, modules


def _left_out(config: TargetedConfig, base: BaseModel, indices: list[int], report: Report) -> list[int]:
    if base.num_layers is None and not _is_everywhere(config):
        report.problems.append("the base model's number of layers decides leave_out: name the base model (--base)")
    return [index for index in range(base.num_layers or max(indices) + 1) if index not in indices]


def _is_everywhere(config: TargetedConfig) -> bool:
    """Whether the targets are named so that no layer can be without."""
    drop, names = getattr(config, "adapter_drop", None), (config.target_modules, config.exclude_modules)
    if drop is not None or config.layers_to_transform not in (None, []) or any(isinstance(name, str) for name in names):
        return False
    return not any(part.isdigit() for group in names for name in group or () for part in name.split("."))


def _module(target: Target, layer: int, module: str) -> str:
    return f"{target.layout.base}.{target.layout.layers}.{layer}.{module}"


def _shapes(hidden: int, inner: int, phm: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parts that its widths tell."""
    if phm:
        return {"adapter.down.b": (inner,), "adapter.up.b": (hidden,)}
    return {
        "adapter.down_proj.weight": (inner, hidden),
        "adapter.down_proj.bias": (inner,),
        "adapter.up_proj.weight": (hidden, inner),
        "adapter.up_proj.bias": (hidden,),
    }


def _check_shapes(site: Site, parts: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError for a part of another shape; -1 stands for any size."""
    for name, shape in wanted.items():
        found = tuple(parts[name].shape)
        if len(found) != len(shape) or any(size not in (-1, other) for size, other in zip(shape, found, strict=True)):
            raise ValueError(f"{name} in layer {site.layer}, {site.module} has shape {found}: must be {shape}")


def _require(site: Site, wanted: set[str], found: Mapping[str, Tensor]) -> None:
    """Raises a ValueError if tensors are missing, or there are others."""
    where = f" in layer {site.layer}, {site.module}"
    for kind, names in (("miss", wanted - found.keys()), ("have unexpected", found.keys() - wanted)):
        if names:
            raise ValueError(f"the weights {kind} {', '.join(sorted(names)[:_SHOWN])}{where}")
