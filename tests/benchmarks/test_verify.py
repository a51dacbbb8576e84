"""The comparison with another commit: that it sees what is slower or wrong, and nothing where there is nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import verify
from command import runner
from measure import WrongResultError
from rich.console import Console
from turns import Worker

from peft_ext._loader import native_devices

ROOT = verify.ROOT
TOY = ["lora_linear", "--shape", "3,8,6,2,0.25", "--rounds", "3", "--seconds", "0", "--starts", "2"]
KEY = ("lora_linear", "3,8,6,2", "float32", 1, "forward")
needs_native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build to compare")
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="this is no git repository"
)
run = runner(verify.main)


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the package to make worse; it has the same extension."""
    shutil.copytree(ROOT / "peft_ext", tmp_path / "peft_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def append(tree: Path, code: str) -> None:
    source = tree / "peft_ext/nn/lora.py"
    source.write_text(f"{source.read_text()}\n{code}")


@needs_native
@needs_git
def test_report(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    code, output = run(*TOY, "--base", "HEAD", "--base-tree", ROOT, "--limit", "1e6", "--json", path)
    assert code == 0, output
    assert "0 of 2 slower by more than" in output
    report = json.loads(path.read_text())
    assert len(report["header"]["base"]) == 40
    assert [row["pass"] for row in report["rows"]] == ["forward", "forward+backward"]
    for row in report["rows"]:
        assert row.keys() == verify.Row.__annotations__.keys()
        assert row["base_ms"] > 0 and row["here_ms"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


@needs_native
@needs_git
def test_a_slower_base_is_seen(changed: Path, tmp_path: Path) -> None:
    append(changed, SLEEPS)
    path = tmp_path / "verify.json"
    code, output = run(*TOY, "--base", "HEAD", "--base-tree", changed, "--json", path)
    assert code == 0, output
    assert {row["verdict"] for row in json.loads(path.read_text())["rows"]} == {"faster"}


SLEEPS = """
import time
_forward = LoRALinear.forward
def _sleep(self, x):
    time.sleep(0.02)
    return _forward(self, x)
LoRALinear.forward = _sleep
"""
WRONG = """
_forward = LoRALinear.forward
LoRALinear.forward = lambda self, x: _forward(self, x) + 1e-3
"""


@needs_native
@needs_git
def test_wrong_results_have_no_figures(changed: Path, tmp_path: Path) -> None:
    append(changed, WRONG)
    path = tmp_path / "verify.json"
    code, output = run(*TOY, "--base", "HEAD", "--base-tree", changed, "--json", path)
    assert code == 1 and not path.exists()
    assert "results differ, no figures: base: lora_linear M,K,N,r,dropout=3,8,6,2,0" in output
    assert "ours: y is off" in output


def ratios(*starts: float, noise: float = 0.004, rounds: int = 40) -> list[dict[str, list[float]]]:
    """Times of each start whose ratio is as given, in a noise of that size."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for ratio in starts:
        base, here = (1 + noise * torch.randn(2, rounds, generator=generator, dtype=torch.float64)).tolist()
        found.append({verify.BASE: base, verify.HERE: [ratio * time for time in here]})
    return found


@pytest.mark.parametrize(
    ("starts", "verdict", "too_slow"),
    [
        ((1.0, 1.0, 1.0), "same", False),
        ((1.1, 1.1, 1.1), "slower", True),
        ((1.02, 1.02, 1.02), "slower", False),
        ((0.9, 0.9, 0.9), "faster", False),
        ((1.1, 1.1, 0.99), "same", False),  # one process was unlucky, or two
    ],
)
def test_verdict_needs_the_starts_to_agree(starts: tuple[float, ...], verdict: str, too_slow: bool) -> None:
    row = verify.summarize(KEY, ratios(*starts))
    assert row["verdict"] == verdict
    assert verify.too_slow(row, 0.03) == too_slow
    assert row["ratio"] == pytest.approx(sorted(starts)[len(starts) // 2], abs=0.01)


@needs_git
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "op: got 'no_such_op'"),
        (["--base", "no-such-commit"], "base: got 'no-such-commit', want a commit"),
        (["lora_linear", "--implementation", "theirs"], "implementation: got 'theirs'"),
        (["lora_linear", "--passes", "backward"], "passes: got 'backward'"),
        (["lora_linear", "--filter", "no such shape"], "no shape"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    base = [] if "--base" in arguments else ["--base", "HEAD"]
    code, output = run(*arguments, *base)
    assert code == 2
    assert message in output


SETUP = """
from pathlib import Path
assert Path("which").read_text() == "first", "the second does not build"
Path("peft_ext").mkdir()
Path("peft_ext/_build.json").write_text("{}")
"""


@needs_git
def test_another_commit_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "setup.py").write_text(SETUP)
    for text in ("first", "second"):
        (tmp_path / "which").write_text(text)
        git("add", ".")
        git("commit", "-m", text)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "BUILDS", tmp_path / "builds")
    first = verify.resolve("HEAD~1")
    folder = verify.built(first, Console())
    before = (folder / "peft_ext/_build.json").stat().st_mtime_ns
    assert (folder / "which").read_text() == "first"
    assert verify.built(first, Console()) == folder
    assert (folder / "peft_ext/_build.json").stat().st_mtime_ns == before
    with pytest.raises(RuntimeError, match="the second does not build"):
        verify.built(verify.resolve("HEAD"), Console())


def test_a_worker_says_what_fails() -> None:
    problem = {"op": "lora_linear", "sizes": {}, "dtype": "float32", "threads": 1, "implementation": "ours"}
    with Worker("verify_worker.py", "here", path=[ROOT]) as worker:
        with pytest.raises((RuntimeError, WrongResultError), match=r"here: .*(missing|no native build)"):
            worker.build(**problem)
        worker.process.kill()
        with pytest.raises(RuntimeError, match="here: its process ended"):
            worker.build(**problem)
