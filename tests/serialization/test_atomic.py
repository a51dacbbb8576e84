from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_ext.serialization import atomic


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def raise_full(path: Path) -> None:
    raise OSError("disk full")


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


def _killed_at(step: int, action: Callable[[], None]) -> bool:
    """Runs ``action`` in a process that is killed before its ``step``-th call that touches the disk, if any."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def deadly(function: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                calls[0] += 1
                if calls[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        atomic.os.replace, atomic.os.fsync, Path.unlink = map(deadly, (os.replace, os.fsync, Path.unlink))
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("more", [{}, {"extra": None}], ids=["replaced", "one removed"])
def test_killed_at_any_step_the_folder_is_of_one_write(tmp_path: Path, more: dict[str, None]) -> None:
    former = {"config": "1", "weights": "1", "extra": "1"}
    later = {"config": "2", "weights": "2"} | ({} if more else {"extra": "2"})
    kills, found = 0, []
    for step in range(1, 100):
        atomic.write_together({tmp_path / name: write(text) for name, text in former.items()})
        files: dict[Path, atomic.Writer | None] = {tmp_path / name: write(text) for name, text in later.items()}
        files |= {tmp_path / name: None for name in more}
        if not _killed_at(step, lambda files=files: atomic.write_together(files)):
            break
        kills += 1
        atomic.settle(tmp_path)
        found.append(content(tmp_path))
    assert kills >= 10
    assert all(files in (former, later) for files in found)
    assert found[0] == former
    assert found[-1] == later


def test_a_killed_first_write_leaves_nothing(tmp_path: Path) -> None:
    files = {tmp_path / "config": write("1"), tmp_path / "weights": write("1")}
    assert _killed_at(2, lambda: atomic.write_together(files))
    assert content(tmp_path)
    atomic.settle(tmp_path)
    assert content(tmp_path) == {}


def test_several_writers_take_turns(tmp_path: Path) -> None:
    """Readers that settle first see files of one write, whoever writes meanwhile."""
    names = ("config", "weights", "more")

    def write_often(text: str) -> None:
        for _ in range(30):
            atomic.write_together({tmp_path / name: write(text) for name in names})

    write_often("0")
    children = []
    for text in "12":
        children.append(os.fork())
        if children[-1] == 0:
            write_often(text)
            os._exit(0)
    thread = threading.Thread(target=write_often, args=("3",))
    thread.start()
    thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert content(tmp_path) in [dict.fromkeys(names, text) for text in "123"]


def test_a_writer_may_fail_and_remove_its_folder_while_another_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made" / "together"
    second = threading.Thread(target=atomic.write_together, args=({folder / "config": write("2")},))
    waits = threading.Event()
    flock = atomic.fcntl.flock

    def note_the_second(descriptor: int, operation: int) -> None:
        if threading.current_thread() is second:
            waits.set()
        flock(descriptor, operation)

    def fail_once_it_waits(path: Path) -> None:
        second.start()
        waits.wait()
        raise_full(path)

    monkeypatch.setattr(atomic.fcntl, "flock", note_the_second)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_together({folder / "config": fail_once_it_waits})
    second.join()
    assert content(tmp_path) == {"made/together/config": "2"}


def test_another_process_may_make_the_folder_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every rank of a training run does with a checkpoint's folder. It is theirs: a failure leaves it."""
    mkdir = Path.mkdir

    def second(folder: Path) -> None:
        mkdir(folder)
        mkdir(folder)

    monkeypatch.setattr(Path, "mkdir", second)
    atomic.write_together({tmp_path / "run" / "checkpoint" / "config": write("1")})
    assert content(tmp_path) == {"run/checkpoint/config": "1"}
    with pytest.raises(OSError, match="disk full"):
        atomic.write_together({tmp_path / "other" / "config": raise_full})
    assert (tmp_path / "other").is_dir()


def test_a_folder_that_came_into_use_stays_on_failure(tmp_path: Path) -> None:
    def write_beside_and_fail(path: Path) -> None:
        path.with_name("theirs").write_text("1")
        raise_full(path)

    with pytest.raises(OSError, match="disk full"):
        atomic.write_together({tmp_path / "new" / "config": write_beside_and_fail})
    assert content(tmp_path) == {"new/theirs": "1"}


def test_what_cannot_be_put_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tmp_path / "config": write("1"), tmp_path / "weights": write("1")}
    atomic.write_together(files)
    assert _killed_at(4, lambda: atomic.write_together(files))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(atomic.os, "replace", refuse)
    with pytest.raises(OSError, match="a write that was cut off, and they cannot be put back"):
        atomic.settle(tmp_path)
