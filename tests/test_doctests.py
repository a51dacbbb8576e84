"""The examples of all docstrings run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import peft_ext

# By import, not by path: peft_ext.ops.lora_linear is the module to an import, but the function to an attribute look-up.
MODULES = [m.name for m in pkgutil.walk_packages(peft_ext.__path__, "peft_ext.") if m.name != "peft_ext.__main__"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for test in finder.find(importlib.import_module("peft_ext.ops.lora_linear")) if test.examples]
    assert found
