"""Lets another process take its turns in a run: a second build of the extension, or a peer that needs its own Python.

The process is a script of this folder that calls :func:`serve`. It is asked one thing at a time, and so is idle while
another is timed; rounds go on as within one process, and drift hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeAlias

import torch
from measure import Elsewhere, WrongResultError, peak_bytes, time_block, time_on_host
from registry import WITHOUT_GRAD, Task, Tensors

HERE = Path(__file__).parent
REST_SECONDS = 0.003
"""Before a turn: OpenMP's threads of the process before spin for about so long."""

Build: TypeAlias = Callable[[dict[str, Any]], tuple[Task, Tensors]]
"""Makes a task, and the results to send back, of what was asked."""


class Worker:
    """The other process, from this side.

    Args:
        script: a file of this folder.
        name: who speaks, in errors.
        python: its interpreter.
        path: folders that come first on its path.

    Raises:
        WrongResultError: from any call that finds wrong results there.
        RuntimeError: from any call that fails there, or where the process ends.
    """

    def __init__(self, script: str, name: str, python: str = sys.executable, path: Sequence[Path] = ()) -> None:
        self.name = name
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
        self.process = subprocess.Popen(
            [python, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.process.communicate()  # the end of its input is what it stops at

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "wrong" in answer:
            raise WrongResultError(f"{self.name}: {answer['wrong']}")
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def build(self, **problem: Any) -> tuple[Task, Tensors]:
        """A task whose passes run there, and its results. ``problem`` is JSON; it takes the place of the one before."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.pt"
            names = self.ask(do="build", problem=problem, results=str(path))
            results = torch.load(path, weights_only=True)
        return Task({name: TakenTurn(self, name) for name in names}, lambda: results), results


class TakenTurn(Elsewhere):
    """A pass of the task that a worker has built."""

    def __init__(self, worker: Worker, pass_name: str) -> None:
        self.worker, self.pass_name = worker, pass_name

    def __call__(self) -> None:
        self.milliseconds(1)

    def milliseconds(self, calls: int) -> float:
        time.sleep(REST_SECONDS)
        return self.worker.ask(do="time", pass_name=self.pass_name, calls=calls)

    def peak_bytes(self) -> int:
        return self.worker.ask(do="peak", pass_name=self.pass_name)


def serve(build: Build) -> None:
    """Answers until its input ends. What libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(build)
    for line in sys.stdin:
        reply(server, json.loads(line), answers)


class Server:
    """The other process, from its own side."""

    def __init__(self, build: Build) -> None:
        self.make = build
        self.task: Task | None = None

    def build(self, problem: dict[str, Any], results: str) -> list[str]:
        self.task = None  # frees what it held
        self.task, found = self.make(problem)
        torch.save({name: tensor.detach().contiguous() for name, tensor in found.items()}, results)
        return list(self.task.passes)

    def time(self, pass_name: str, calls: int) -> float:
        assert self.task
        with torch.set_grad_enabled(pass_name not in WITHOUT_GRAD):
            return time_block(self.task, pass_name, calls, time_on_host) * calls

    def peak(self, pass_name: str) -> int:
        assert self.task
        with torch.set_grad_enabled(pass_name not in WITHOUT_GRAD):
            return peak_bytes(self.task, pass_name)


def reply(server: Server, question: Mapping[str, Any], answers: TextIO) -> None:
    arguments = {key: value for key, value in question.items() if key != "do"}
    try:
        answer = {"value": getattr(server, question["do"])(**arguments)}
    except WrongResultError as error:
        answer = {"wrong": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    print(json.dumps(answer), file=answers, flush=True)
