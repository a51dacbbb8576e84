"""``transformers.Trainer`` whose checkpoints are adapters.

The plain ``Trainer`` trains an adapted model too, but knows only Hugging Face PEFT's own class, and
so would write the whole model at every checkpoint. This module imports transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_ext.tuners.model import PeftModel


def find_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in a ``Trainer``'s output folder, to resume from; None if there is none.

    A checkpoint that was cut off, by a killed process or a full disk, is passed over.
    """
    found = [path.parent for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(filter(_is_whole, found), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether it was written to its end: the Trainer's state is written last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


class Trainer(transformers.Trainer):
    """Trains as ``transformers.Trainer`` does; saves, resumes and reloads the best adapter alone.

    For models that are not a :class:`PeftModel` it is ``transformers.Trainer``.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            model.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed from the last step: transformers would take one more
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self.model if model is None else model
        if isinstance(adapted, PeftModel):
            _load_adapters(adapted, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            _load_adapters(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def _load_adapters(model: PeftModel, checkpoint: str) -> None:
    for name in model.peft_config:
        folder = Path(checkpoint) if name == "default" else Path(checkpoint) / name
        model.load_adapter(folder, name, is_trainable=True)
