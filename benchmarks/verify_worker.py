"""One build's side of ``verify.py``: checks and times what it is told to, with the first ``peft_ext`` on its path."""

from __future__ import annotations

from typing import Any

import torch
from measure import SEED, check, make_tensors
from registry import Dtypes, Task, Tensors, load
from turns import serve

from peft_ext._loader import native_devices


def build(problem: dict[str, Any]) -> tuple[Task, Tensors]:
    """Of ``op``, ``sizes``, ``dtype``, ``threads``, ``implementation``; only if it matches this build's oracle."""
    if "cpu" not in native_devices:
        raise RuntimeError("there is no native build, so nothing to compare")
    torch.set_num_threads(problem["threads"])
    benchmark = load(problem["op"])
    shape = benchmark.shape_type(**problem["sizes"])
    dtypes = Dtypes.parse(problem["dtype"])
    chosen = next(i for i in benchmark.implementations if i.name == problem["implementation"])
    check(benchmark, [chosen], shape, dtypes)
    task = chosen.build(shape, make_tensors(benchmark, shape, dtypes))
    if task.setup:
        task.setup()
    torch.manual_seed(SEED)
    return task, task.results()


if __name__ == "__main__":
    serve(build)
