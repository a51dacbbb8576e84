from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_ext.serialization import atomic


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_writes_and_replaces(tmp_path: Path) -> None:
    files = {tmp_path / "a" / "config": write("c1"), tmp_path / "a" / "weights": write("w1")}
    atomic.write_together(files)
    assert content(tmp_path) == {"a/config": "c1", "a/weights": "w1"}
    atomic.write_together({tmp_path / "a" / "config": write("c2"), tmp_path / "a" / "weights": None})
    assert content(tmp_path) == {"a/config": "c2"}


def _fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Makes the ``step``-th call that touches the disk fail, once."""
    calls = [0]

    def failing(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == step:
                raise OSError("disk full")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(atomic.os, "replace", failing(os.replace))
    monkeypatch.setattr(atomic.os, "fsync", failing(os.fsync))
    return calls


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_at_any_step_leaves_the_former_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    old = {tmp_path / "ckpt" / "config": write("c1"), tmp_path / "ckpt" / "weights": write("w1")}
    new = {
        tmp_path / "ckpt" / "config": write("c2"),
        tmp_path / "ckpt" / "weights": write("w2"),
        tmp_path / "ckpt" / "other" / "config": write("c3"),
    }
    if exists:
        atomic.write_together(old)
    before = content(tmp_path)
    failures = 0
    for step in range(1, 100):
        with monkeypatch.context() as patch:
            calls = _fail_at(patch, step)
            try:
                atomic.write_together(new)
                break
            except OSError:
                failures += 1
        assert calls[0] >= step
        assert content(tmp_path) == before
        assert (tmp_path / "ckpt").exists() == exists
    # three files are flushed, set aside if they exist, and named; two folders are flushed
    assert failures == (10 if exists else 8)
    assert content(tmp_path) == {"ckpt/config": "c2", "ckpt/weights": "w2", "ckpt/other/config": "c3"}


def test_a_failing_writer_leaves_the_former_files(tmp_path: Path) -> None:
    atomic.write_together({tmp_path / "config": write("c1")})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        atomic.write_together({tmp_path / "config": write("c2"), tmp_path / "weights": fail})
    assert content(tmp_path) == {"config": "c1"}


def test_an_old_config_never_stands_beside_new_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = tmp_path / "config", tmp_path / "weights"
    atomic.write_together({config: write("1"), weights: write("1")})
    seen = []

    def spy(source: Path, target: Path) -> None:
        os.rename(source, target)
        seen.append(content(tmp_path))

    monkeypatch.setattr(atomic.os, "replace", spy)
    atomic.write_together({config: write("2"), weights: write("2")})
    assert len(seen) == 4
    assert all("config" not in files or files["config"] == files.get("weights") for files in seen)
