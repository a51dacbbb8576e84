"""Saves an adapter's shards, or loads what other processes saved: torchrun starts it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from process import process_group
from safetensors.torch import load_file
from train import WAYS, adapted_model, full, trained

from peft_ext import get_peft_model_state_dict, set_peft_model_state_dict


def blank(way: str) -> Any:
    """The model, laid out, with an adapter of ones."""
    model = WAYS[way](adapted_model())
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.fill_(1.0)
    return model


def save(way: str, folder: Path) -> None:
    model: Any = WAYS[way](adapted_model())
    dcp.save(get_peft_model_state_dict(model), checkpoint_id=folder / "shards")
    model.save_pretrained(folder / "adapter", is_main_process=dist.get_rank() == 0)


def load(way: str, folder: Path) -> None:
    """Both forms give every process its part of the values that were saved."""
    expected = {name: parameter.detach() for name, parameter in trained(adapted_model()).items()}
    from_shards = blank(way)
    dcp.load(get_peft_model_state_dict(from_shards), checkpoint_id=folder / "shards")
    from_file = blank(way)
    set_peft_model_state_dict(from_file, load_file(folder / "adapter" / "adapter_model.safetensors"))
    for model in (from_shards, from_file):
        found = {name: full(parameter) for name, parameter in trained(model).items()}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", choices=WAYS, nargs="+")
    given = parser.parse_args()
    with process_group():
        for way in given.ways:
            (save if given.action == "save" else load)(way, given.folder)


if __name__ == "__main__":
    main()
