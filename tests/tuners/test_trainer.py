from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_ext import LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]


def rows(count: int) -> list[dict[str, Any]]:
    """Sentences whose label is whether they begin with a high token."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (count, 6), generator=generator)
    return [{"input_ids": row, "token_type_ids": 0 * row, "labels": int(row[0] > 25)} for row in ids]


def trainer(cls: type, make: Make, folder: Path, **arguments: Any) -> Any:
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1)
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **arguments,
    )
    return cls(model=get_peft_model(make("bert"), config), args=options, train_dataset=rows(32), eval_dataset=rows(8))


def test_saves_resumes_and_reloads_the_best_adapter(tiny: Make, run: Run, tmp_path: Path) -> None:
    from peft_ext.tuners.trainer import Trainer

    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "save_strategy": "steps", "eval_strategy": "steps"}
    whole = trainer(Trainer, tiny, tmp_path / "whole", load_best_model_at_end=True, **options)
    whole.train()
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    best = PeftModel.from_pretrained(tiny("bert"), whole.state.best_model_checkpoint)
    assert torch.equal(run(best), run(whole.model.eval()))

    last = PeftModel.from_pretrained(tiny("bert"), tmp_path / "whole" / "checkpoint-4")
    resumed = trainer(Trainer, tiny, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(run(resumed.model.eval()), run(last))
    resumed.save_model(str(tmp_path / "final"))
    assert torch.equal(run(PeftModel.from_pretrained(tiny("bert"), tmp_path / "final")), run(resumed.model))


def test_the_plain_trainer_trains_and_evaluates(tiny: Make, tmp_path: Path) -> None:
    plain = trainer(transformers.Trainer, tiny, tmp_path, max_steps=3)
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    plain.train()
    assert plain.label_names == ["labels"]
    assert "eval_loss" in plain.evaluate()
    moved = {name for name, p in plain.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in plain.model.named_parameters() if p.requires_grad}


def test_other_models_are_left_to_transformers(tiny: Make, tmp_path: Path) -> None:
    from peft_ext.tuners.trainer import Trainer

    options = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model=tiny("bert"), args=options).save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "adapter_config.json").exists()
