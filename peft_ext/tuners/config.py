"""Configurations, in the fields and the file format of Hugging Face PEFT."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

from peft_ext.serialization import hf_peft
from peft_ext.serialization.atomic import write_together


class PeftType(str, Enum):
    """The methods, under the names that ``adapter_config.json`` uses: Hugging Face PEFT's, then ours."""

    LORA = "LORA"
    LOKR = "LOKR"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    HOULSBY = "HOULSBY"
    PFEIFFER = "PFEIFFER"
    ADAPTER_FUSION = "ADAPTER_FUSION"
    COMPACTER = "COMPACTER"
    COMPACTER_PLUS_PLUS = "COMPACTER_PLUS_PLUS"
    BITFIT = "BITFIT"
    SIDE_TUNING = "SIDE_TUNING"
    HIDDEN_PROMPT = "HIDDEN_PROMPT"


class TaskType(str, Enum):
    """What the model is trained for; decides which head is trained and saved with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """What every method's configuration has.

    Args:
        task_type: a :class:`TaskType` or its name; None wraps the model without a task.
        peft_type: the method; set by each subclass.
        auto_mapping: class and library of the base model, written for models without a task type.
        peft_version: version of Hugging Face PEFT that wrote the file, if one did.
        base_model_name_or_path: where the base model came from; filled in by ``get_peft_model``.
        revision: revision of the base model.
        inference_mode: whether the adapter is created frozen.

    Raises:
        ValueError: for a task type that does not exist.
    """

    checkpoint_prefix: ClassVar[str] = "base_model.model."
    """What Hugging Face PEFT puts before the name that a module has in the plain model."""

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = member(TaskType, self.task_type, "task_type")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        check_list("modules_to_save", getattr(self, "modules_to_save", None), str)
        self._unknown: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, and the fields of the file that this version does not know."""
        return {**dataclasses.asdict(self), **self._unknown}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """The configuration that ``values`` describe; ``peft_type`` chooses the class.

        Keys that this version does not know are kept and written back. Those that are set to
        something are warned of, as they may belong to a newer format.

        Raises:
            ValueError, TypeError: for a ``peft_type`` that is unknown or not this class's, and for
                values that its fields do not take.
        """
        kind = member(PeftType, values.get("peft_type", cls.peft_type), "peft_type")
        config_cls = CONFIG_CLASSES[kind]
        if not issubclass(config_cls, cls):
            raise ValueError(f"peft_type is {kind.value!r}, which {cls.__name__} is not for: use {config_cls.__name__}")
        names = {f.name for f in dataclasses.fields(config_cls)}
        config = config_cls(**{key: value for key, value in values.items() if key in names})
        config._unknown = {key: value for key, value in values.items() if key not in names}
        ignored = sorted(key for key, value in config._unknown.items() if value)
        if ignored:
            warnings.warn(f"the configuration has fields that are unknown here and ignored: {ignored}", stacklevel=2)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes ``adapter_config.json`` into a folder, which is created if need be."""
        write_together(hf_peft.config_files(save_directory, self.to_dict()))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any
    ) -> PeftConfig:
        """Reads ``adapter_config.json`` from a folder or a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, or ``"owner/name"`` on the hub.
            subfolder: folder in it that holds the adapter.
            **hub_kwargs: passed to ``huggingface_hub.snapshot_download`` (``revision``, ``token``, ...).

        Raises:
            FileNotFoundError: if there is no configuration.
            ValueError, TypeError: if it is not a PEFT configuration, or has values that are not supported.
        """
        folder = hf_peft.find_folder(pretrained_model_name_or_path, subfolder, **hub_kwargs)
        return cls.from_dict(hf_peft.read_config(folder))


@dataclass
class TargetedConfig(PeftConfig):
    """What the configurations of methods that adapt chosen modules have.

    Args:
        target_modules: which modules are adapted: a list of names, each of which is a module's full
            name or ends it (after a dot); a regular expression that matches the full name; or
            ``"all-linear"``, every linear layer but a transformers model's output head; or
            ``"dummy-target-modules"``, none (``modules_to_save`` alone is trained). None takes the
            default of the model's architecture.
        exclude_modules: which of them are not, a list of names or a regular expression.
        modules_to_save: names of modules, or ends of names, that are trained in full and saved with the
            adapter; ``"classifier"`` names ``"pre_classifier"`` too, but ``"1"`` does not name ``"11"``.
        layers_to_transform: indices of the layers that are adapted; needs a list of targets.
        layers_pattern: name of the list of layers, such as ``"layers"``; any by default.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not isinstance(value, str):
                check_list(name, value, str)
            elif name != "layers_pattern":
                check_patterns(name, [value])
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        check_patterns("layers_pattern", patterns or ())
        if not isinstance(self.layers_to_transform, int):
            check_list("layers_to_transform", self.layers_to_transform, int)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules to be a list, not a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")


CONFIG_CLASSES: dict[PeftType, type[PeftConfig]] = {}
"""The configuration class of every method. Each method's file adds its own."""

EnumT = TypeVar("EnumT", bound=Enum)


def member(kinds: type[EnumT], value: Any, name: str) -> EnumT:
    """The member of this value; a ValueError that lists all of them if there is none."""
    try:
        return kinds(value)
    except ValueError:
        known = ", ".join(repr(kind.value) for kind in kinds)
        raise ValueError(f"{name} is {value!r}, which is not supported: must be one of {known}") from None


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raises a ValueError unless all are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} {pattern!r} is not a regular expression: {error}") from error


def check_list(name: str, value: Any, kind: type) -> None:
    """Raises a TypeError unless ``value`` is None or holds nothing but ``kind``."""
    fits = isinstance(value, list | tuple | set) and all(isinstance(item, kind) for item in value)
    if value is not None and not fits:
        raise TypeError(f"{name} must be a list of {kind.__name__}, got {value!r}")
