"""The adapted model that users hold: ``get_peft_model``, ``PeftModel`` and its task classes."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn.trainable import print_trainable_parameters, trainable_parameters
from peft_ext.serialization import adapterhub, hf_peft
from peft_ext.serialization.atomic import Writer, write_together
from peft_ext.tuners.adapterhub.layouts import BaseModel
from peft_ext.tuners.adapterhub.writing import to_adapterhub
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner
from peft_ext.tuners.checkpoint import read_checkpoint
from peft_ext.tuners.config import PeftConfig, PeftType, TaskType
from peft_ext.tuners.layer import walk
from peft_ext.tuners.mixed import AdapterNames, check_per_row, run_with
from peft_ext.tuners.state_dict import (
    SaveEmbeddings,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    whole,
)


class PeftModel(nn.Module):
    """A model with adapters: names, arguments and checkpoints are Hugging Face PEFT's.

    The model itself is ``base_model.model``; attributes that this class lacks are looked up there.

    Args:
        model: the model to adapt; its modules are replaced in place.
        peft_config: which method, where, and how; copied.
        adapter_name: name of the first adapter.
        autocast_adapter_dtype: keep adapters in float32 where the model is in a half precision.
        tensors: a checkpoint to load into the adapter, keyed as :func:`get_peft_model_state_dict` has it.

    Raises:
        TypeError: for a configuration that belongs to no method.
        ValueError: for a configuration or checkpoint that does not fit the model, which is then as it was.

    Example:
        >>> import torch
        >>> from peft_ext import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    """

    head_names: tuple[str, ...] = ()
    """Modules that a task trains in full: its head, which pretraining has not seen."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(peft_config.peft_type, PeftType):
            raise TypeError(f"peft_config must be of a method, such as LoraConfig, got {type(peft_config).__name__}")
        tuner = TUNER_CLASSES[peft_config.peft_type](model)
        tuner.add_adapter(adapter_name, self._with_head(peft_config), autocast_adapter_dtype, tensors)
        self.base_model: BaseTuner = tuner
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            # checkpointed layers pass no gradient on unless some input needs one
            tuner.enable_input_require_grads()

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list where there is not exactly one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model takes further keyword arguments with its labels; ``transformers.Trainer`` asks."""
        base = self.get_base_model()
        parameters = inspect.signature(base.forward).parameters.values()
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        return getattr(base, "accepts_loss_kwargs", takes_any)

    def config_of(self, adapter_name: str) -> PeftConfig:
        """The adapter's configuration; a ValueError that lists the adapters if there is none of this name."""
        return self.base_model.config_of(adapter_name)

    def get_base_model(self) -> nn.Module:
        """The model inside, with the adapters in it."""
        return self.base_model.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; adapters in use are not changed by other threads meanwhile (a graph has no such lock)."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with self.base_model.calls.using(partial(self.base_model.names_in_use, kwargs.get("adapter_names"))):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output.

        Args:
            *args: the base model's.
            **kwargs: the base model's, and ``adapter_names``: the adapter of each row of the batch, "__base__" for
                none; or a list for each row with the adapter of each token, where the method has no prompt and no
                convolution, and trains no whole modules but linear ones, embeddings and norms; or what
                :meth:`adapter_indices` makes of such names. The active adapters do not count then.

        Raises:
            ValueError, TypeError: for ``adapter_names`` that do not fit.
        """
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: AdapterNames | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate``, with the active adapters at work, or those of ``adapter_names`` for each row.

        Beams and several sequences to a row have the row's adapter. With ``adapter_names``, which parameters and
        scalings an adapter of LoRA has is looked up once a call: what a callback exchanges shows in the next one.
        """
        tuner = self.base_model
        with tuner.calls.using(partial(tuner.names_in_use, adapter_names)):
            if adapter_names is None:
                return run_with(
                    None, tuner.generate, *args, **kwargs
                )  # within another model's call: its mix is not ours
            mix = tuner.mix(adapter_names, args, kwargs)
            check_per_row(mix, "generate()")
            mix.expands = True
            return run_with(mix, tuner.generate, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True) -> None:
        """Adds an untrained, inactive adapter; see :meth:`BaseTuner.add_adapter`."""
        config = self._with_head(peft_config)
        config.base_model_name_or_path = config.base_model_name_or_path or _source(self.get_base_model())
        self.base_model.add_adapter(adapter_name, config, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one or several adapters the active ones; see :meth:`BaseTuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; see :meth:`BaseTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model computes what the base model does. Merged adapters are unmerged."""
        disabled = [slot for _, slot in self.base_model.slots() if not slot.disable_adapters]
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            for slot in disabled:
                slot.disable_adapters = False

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        return trainable_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints :meth:`get_nb_trainable_parameters`."""
        print_trainable_parameters(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool | None = None,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        format: str = "peft",
    ) -> None:
        """Writes adapters: ``default`` into the folder, others into subfolders.

        All files are written or none: a failure leaves the checkpoint that was there. Threads that would change these
        adapters wait for it.

        Args:
            save_directory: the folder; created if need be.
            safe_serialization: write safetensors, or else ``.bin``. By default safetensors in Hugging Face PEFT's
                format, and ``.bin`` in AdapterHub's, which reads safetensors only with ``use_safetensors=True``.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: see :func:`get_peft_model_state_dict`.
            is_main_process: False writes nothing. Where parameters are DTensors, all processes have to call this, since
                they gather them together.
            state_dict: values to write instead of the model's, keyed as its state dict.
            format: "peft", Hugging Face PEFT's, or "adapterhub", which ``load_adapter`` of the library ``adapters``
                reads, and ``load_adapter_setup`` where adapters are fused. What that format has no place for is an
                error, such as layer norms that were trained with the adapter.

        Raises:
            TypeError, ValueError: for names that are no adapters or are given twice, an unknown format, and an adapter
                that has no counterpart in it.
            OSError: if the files cannot be written.
        """
        tuner = self.base_model

        def names() -> list[str]:
            selected = list(self.peft_config) if selected_adapters is None else selected_adapters
            return tuner.check_names("selected_adapters", selected)

        with tuner.calls.using(names):
            files = {}
            for name in names():
                tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers)
                tensors = {key: whole(tensor) for key, tensor in tensors.items()}
                folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
                files.update(self._adapter_files(name, folder, tensors, safe_serialization, format))
            if is_main_process:
                write_together(files)

    def _adapter_files(
        self, adapter_name: str, folder: str, tensors: Mapping[str, Tensor], safe: bool | None, format: str
    ) -> dict[Path, Writer | None]:
        """What ``write_together`` writes for an adapter."""
        config = self._config_to_save(adapter_name)
        if format == "peft":
            return hf_peft.adapter_files(folder, config, tensors, safe is None or safe)
        if format != "adapterhub":
            raise ValueError(f"format must be 'peft' or 'adapterhub', got {format!r}")
        stored = to_adapterhub(config, tensors, adapter_name, BaseModel.of_model(self.get_base_model()))
        return adapterhub.files_of(folder, stored, bool(safe))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes to the Hugging Face hub; the base model is not sent.

        Args:
            repo_id: ``"owner/name"``; created if need be.
            commit_message, revision, create_pr: of the commit.
            private: whether a new repository is private.
            token: of the hub; by default the one that is logged in.

        Returns:
            The commit's address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return commit.commit_url

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> PeftModel:
        """Puts a saved adapter into a model.

        Args:
            model: the base model; changed in place.
            model_id: the adapter's folder, or its repository on the Hugging Face hub; in Hugging Face PEFT's
                format or in AdapterHub's.
            adapter_name: the name it gets.
            is_trainable: whether it is trained further; else it is frozen and the model put into eval mode.
            config: replaces the saved configuration.
            autocast_adapter_dtype: keep the adapter in float32 where the model is in a half precision.
            subfolder: folder in ``model_id`` that holds the adapter.
            **hub_kwargs: passed to ``huggingface_hub.snapshot_download`` (``revision``, ``token``, ...).

        Returns:
            The adapted model, of the class that the configuration's task has.

        Raises:
            FileNotFoundError: if there is no adapter.
            ValueError, TypeError: if its files are damaged, of another format, or do not fit the
                model, which is then as it was.
        """
        folder = hf_peft.find_folder(model_id, subfolder, **hub_kwargs)
        values, tensors = read_checkpoint(folder, model)
        config = copy.deepcopy(config) or PeftConfig.from_dict(values)
        config.inference_mode = not is_trainable
        task_cls = TASK_CLASSES.get(config.task_type, cls)
        peft_model = task_cls(model, config, adapter_name, autocast_adapter_dtype, tensors)
        return peft_model if is_trainable else peft_model.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Loads a saved adapter beside the others, inactive, or new values into one that is there.

        Arguments and errors are those of :meth:`from_pretrained`.
        """
        folder = hf_peft.find_folder(model_id, subfolder, **hub_kwargs)
        values, tensors = read_checkpoint(folder, self.get_base_model())
        config = PeftConfig.from_dict(values)
        with self.base_model.calls.changing():
            if isinstance(adapter_name, str) and adapter_name in self.peft_config:
                set_peft_model_state_dict(self, tensors, adapter_name)
            else:
                config.inference_mode = not is_trainable
                self.base_model.add_adapter(adapter_name, self._with_head(config), autocast_adapter_dtype, tensors)
                self.base_model.set_requires_grad(adapter_name, is_trainable)
            if not is_trainable and any(module.training for _, module in walk(self)):
                self.eval()

    def _with_head(self, config: PeftConfig) -> PeftConfig:
        """A copy of the configuration in which the task's head is trained and saved too."""
        config = copy.deepcopy(config)
        if self.head_names and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *self.head_names]))
        return config

    def _config_to_save(self, adapter_name: str) -> dict[str, Any]:
        config = self.config_of(adapter_name).to_dict() | {"inference_mode": True}
        base = type(self.get_base_model())
        if config["task_type"] is None:
            config["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
        return config


class _TaskModel(PeftModel):
    """Names the inputs of a task: ``transformers.Trainer`` looks at the signature for what to pass."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        given = {name: value for name, value in named.items() if value is not None}
        return self.base_model(**given, **kwargs)


class PeftModelForSequenceClassification(_TaskModel):
    """A classifier of sequences; its head is trained and saved with the adapter."""

    head_names = ("classifier", "score")


class PeftModelForTokenClassification(_TaskModel):
    """A classifier of tokens; its head is trained and saved with the adapter."""

    head_names = ("classifier", "score")


class PeftModelForCausalLM(_TaskModel):
    """A decoder that predicts the next token."""


class PeftModelForSeq2SeqLM(_TaskModel):
    """An encoder with a decoder."""


class PeftModelForFeatureExtraction(_TaskModel):
    """A model without a head."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model that marks an answer's start and end; its head is trained and saved with the adapter."""

    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        given = {name: value for name, value in positions.items() if value is not None}
        return self.base_model(input_ids, **given, **kwargs)


TASK_CLASSES: dict[str | None, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> PeftModel:
    """Puts an adapter into a model and freezes everything else.

    Args:
        model: any module; its layers are replaced in place.
        peft_config: which method, where, and how; copied.
        adapter_name: the adapter's name.
        autocast_adapter_dtype: keep the adapter in float32 where the model is in a half precision.
        revision: noted in the configuration as the base model's.

    Returns:
        The adapted model, of the class for ``peft_config.task_type``.

    Raises:
        ValueError: for a configuration that does not fit the model, which is then as it was.

    Example:
        >>> from torch import nn
        >>> from peft_ext import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules="all-linear"))
        >>> model.get_nb_trainable_parameters()
        (32, 104)
    """
    config = copy.deepcopy(peft_config)
    config.base_model_name_or_path = _source(model)
    config.revision = revision or config.revision
    return TASK_CLASSES.get(config.task_type, PeftModel)(model, config, adapter_name, autocast_adapter_dtype)


def _source(model: nn.Module) -> str | None:
    """Where a transformers model was loaded from."""
    return getattr(model, "name_or_path", None) or None
