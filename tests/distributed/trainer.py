"""The Trainer on an adapted model, as torchrun starts it: in several processes it is DDP."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from process import process_group
from torch.utils.data import Dataset
from train import BATCH, STEPS, adapted_model, batches, full, trained
from transformers import TrainingArguments

from peft_ext.tuners.trainer import Trainer


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.rows = batches().flatten(0, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    with process_group():
        model = adapted_model()
        arguments = TrainingArguments(
            output_dir=str(given.folder),
            per_device_train_batch_size=BATCH // dist.get_world_size(),
            max_steps=STEPS,
            save_steps=STEPS,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        Trainer(model, arguments, train_dataset=Rows()).train()
        if dist.get_rank() == 0:
            torch.save({name: full(parameter) for name, parameter in trained(model).items()}, given.output)


if __name__ == "__main__":
    main()
