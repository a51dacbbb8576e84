"""The migration pages have every name of the other library's, and no name of ours that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_ext

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def words(text: str) -> set[str]:
    """All names in code."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


def test_every_name_of_hugging_face_peft_is_mentioned() -> None:
    peft = pytest.importorskip("peft")
    classes = {name for name in peft.__all__ if name.endswith("Config")}
    functions = {name for name in peft.__all__ if name[0].islower()}
    assert (classes | functions) - words(page("from-peft")) == set()


def test_what_is_not_supported_does_not_exist_here() -> None:
    for name in ("from-peft", "from-adapterhub"):
        refused = words(page(name).partition("## Not supported")[2])
        configs = {word for word in refused if word.endswith("Config")}
        assert len(configs) > 10
        assert configs.isdisjoint(peft_ext.__all__)


def our_column(text: str) -> Iterator[str]:
    """The cells of tables under the heading ``peft_ext``."""
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if "peft_ext" in cells:
            column = cells.index("peft_ext")
        elif not line.startswith("|"):
            column = None
        elif column is not None:
            yield cells[column]


@pytest.mark.parametrize("name", ["from-peft", "from-adapterhub"])
def test_our_column_has_names_that_exist(name: str) -> None:
    ours = words("".join(our_column(page(name))))
    classes = {word for word in ours if re.fullmatch(r"[A-Z]\w*(Config|Model|Drop)", word)}
    assert len(classes) > 5
    assert classes <= set(peft_ext.__all__)
