"""The docstring data set: the same every time, balanced, and without the answer in the text."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from peft_ext.cli import stdlib_docs
from peft_ext.cli.data import Example
from peft_ext.cli.errors import CliError


@pytest.fixture(scope="module")
def parts() -> tuple[list[Example], list[Example]]:
    return stdlib_docs.build()


def test_same_rows_every_time(parts: tuple[list[Example], list[Example]]) -> None:
    assert stdlib_docs.build() == parts


def test_topics_are_balanced(parts: tuple[list[Example], list[Example]]) -> None:
    for part, rows in zip(parts, (120, 40), strict=True):
        assert Counter(example.label for example in part) == dict.fromkeys(stdlib_docs.TOPICS, rows)


def test_no_text_occurs_twice(parts: tuple[list[Example], list[Example]]) -> None:
    texts = [example.text.lower() for part in parts for example in part]
    assert len(set(texts)) == len(texts)


def test_no_text_names_a_module(parts: tuple[list[Example], list[Example]]) -> None:
    names = {name.lower().lstrip("_") for modules in stdlib_docs.TOPICS.values() for name in modules}
    for example in parts[0] + parts[1]:
        words = {word.lstrip("_") for word in re.findall(r"[a-z_]\w*", example.text.lower())}
        assert not words & names, example


def test_an_object_is_on_one_side_only() -> None:
    texts_of = {f"m:{name}": [f"{name} {i}" for i in range(3)] for name in "abcdefghij"}
    held, kept = stdlib_docs._split(texts_of, set(), test_rows=10)
    assert len(held) == 9
    assert sorted(held + kept) == sorted(text for texts in texts_of.values() for text in texts)
    assert not {text[0] for text in held} & {text[0] for text in kept}


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    stdlib_docs.build()
    assert set(sys.modules) == before


def test_clean() -> None:
    text = """Reads an email.message.Message.

    ----
        from (an) asyncio stream

    >>> read()
    """
    assert stdlib_docs.clean(text) == "Reads an from (an) stream"


def test_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"too few docstrings on 'concurrency' \(0 \+ 0, needs 120 \+ 40\)"):
        stdlib_docs.build(stdlib=tmp_path)
