"""Lets the tests import the benchmark scripts, which are not part of the package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    """A run sets its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
