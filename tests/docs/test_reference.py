"""The reference in docs/api has every public name once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import peft_ext
from peft_ext import models, nn, ops, tuners

API = Path(__file__).parents[2] / "docs" / "api"
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto(?:class|function|data)|py:data):: (\S+)$", re.MULTILINE)


def listed() -> Counter[str]:
    """The last parts of all names in the reference, with how often they appear."""
    names: Counter[str] = Counter()
    for page in API.glob("*.rst"):
        for kind, name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if kind != "currentmodule":
                names[name.rpartition(".")[2]] += 1
    return names


def public(module: ModuleType) -> set[str]:
    return set(module.__all__)


def test_every_public_name_is_there_once() -> None:
    wanted = set().union(*map(public, (peft_ext, models, nn, ops, tuners)))
    names = listed()
    assert wanted - set(names) == set()
    assert [name for name, count in names.items() if count > 1] == []
