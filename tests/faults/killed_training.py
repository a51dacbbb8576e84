"""Trains, is killed at random moments, and resumes, again and again: test_faults.py starts it as a process.

Forked children train: they need not import torch anew. The process that forks them runs nothing of torch itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from peft_ext import LoraConfig, get_peft_model
from peft_ext.tuners.trainer import Trainer, find_checkpoint

STEPS = 10


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.outer(self.inner(inputs).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 16, generator=generator)
        self.labels = torch.randint(4, (64,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


def train(folder: Path) -> None:
    """To the end, from the last whole checkpoint on; with dropout, whose masks are random numbers too."""
    torch.manual_seed(0)
    model = get_peft_model(Classifier(), LoraConfig(target_modules=["inner", "outer"], r=4, lora_dropout=0.5))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer: Any = Trainer(model, arguments, train_dataset=Rows())
    trainer.remove_callback(PrinterCallback)
    checkpoint = find_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.save_pretrained(folder / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps(losses))


def fork(folder: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def main() -> None:
    work, wanted = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    start = time.perf_counter()
    assert os.waitpid(fork(work / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - start
    chance, kills, run = random.Random(0), 0, 0
    finished = []
    while kills < wanted or run not in finished:
        child = fork(work / f"run_{run}")
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert status == 0, "training failed"
            finished.append(run)
            run += kills < wanted
    print(json.dumps({"kills": kills, "runs": len(finished)}))


if __name__ == "__main__":
    main()
