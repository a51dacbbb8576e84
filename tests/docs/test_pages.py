"""The pages of docs/: their Python runs as it is printed, their tables of options are those of the classes."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peft_ext
from peft_ext.tuners import SIDE_NETWORKS
from peft_ext.tuners.config import TargetedConfig
from peft_ext.tuners.prompt_learning import PromptLearningConfig
from peft_ext.tuners.sublayer_tuner import SublayerConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = (
    *("adapterdrop", "adapters", "bitfit", "compacter", "fusion", "lora", "minigpt"),
    *("prefix", "prompt", "ptuning", "side-tuning"),
)
SECTIONS = ("Formula", "When to use it", "Example", "Parameters", "Cost")

BLOCK = re.compile(r"^( *)```(?:python|pycon)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CLASS_HEADING = re.compile(r"^### `(\w+)`$")
OPTION = re.compile(r"^\| `(\w+)` \| (?:`(.*?)`|required) \|")

CLASSES: dict[str, Any] = {
    **{name: getattr(peft_ext, name) for name in peft_ext.__all__},
    **{cls.__name__: cls for cls in (TargetedConfig, SublayerConfig, PromptLearningConfig)},
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def run_block(source: str, namespace: dict[str, Any], place: str) -> None:
    """Runs a script, or a session whose output has to be what is printed."""
    if ">>> " not in source:
        exec(compile(source, place, "exec"), namespace)
        return
    session = doctest.DocTestParser().get_doctest(source, {}, place, place, 0)
    session.globs = namespace
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(session, out=report.append, clear_globs=False)
    assert not failed, "".join(report)


@pytest.fixture
def _own_side_networks() -> Iterator[None]:
    """A page registers a side network; the tests that follow in this process do not know it."""
    before = dict(SIDE_NETWORKS)
    yield
    SIDE_NETWORKS.clear()
    SIDE_NETWORKS.update(before)


@pytest.mark.usefixtures("_own_side_networks")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = BLOCK.findall(text_of(page))
    assert len(blocks) == text_of(page).count("```py"), "a block that is not run"
    for number, (_, source) in enumerate(blocks, start=1):
        run_block(textwrap.dedent(source), namespace, f"{page.name}, block {number}")


def test_a_wrong_result_is_noticed() -> None:
    with pytest.raises(AssertionError, match="Expected"):
        run_block(">>> 1 + 1\n3\n", {}, "here")


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_same_sections_and_a_checked_example(method: str) -> None:
    text = text_of(ROOT / "docs" / f"{method}.md")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    cost = text.partition("\n## Cost\n")[2]
    assert ">>> " in text.partition("\n## Cost\n")[0]
    assert ">>> " in cost, "the worked number of parameters has to be checked"


def options(page: Path) -> Iterator[tuple[str, str, str | None]]:
    """Class, option and default of every row under a heading that is a class."""
    owner = None
    for line in text_of(page).splitlines():
        if line.startswith("#"):
            heading = CLASS_HEADING.match(line)
            owner = heading and heading.group(1)
        row = OPTION.match(line)
        if owner and row:
            yield owner, row.group(1), row.group(2)


TABLES = [(page, *option) for page in PAGES for option in options(page)]


@pytest.mark.parametrize(
    ("page", "owner", "option", "default"), TABLES, ids=[f"{row[0].stem}-{row[1]}-{row[2]}" for row in TABLES]
)
def test_default_of_an_option(page: Path, owner: str, option: str, default: str | None) -> None:
    fields = {field.name: field for field in dataclasses.fields(CLASSES[owner])}
    assert option in fields, f"{owner} has no {option}"
    field = fields[option]
    actual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is None:
        assert actual in (dataclasses.MISSING, None)
    else:
        assert ast.literal_eval(default) == actual


def own_options(config: type) -> list[str]:
    return [name for name, kind in vars(config).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]


CONFIGS = [
    cls
    for cls in CLASSES.values()
    if isinstance(cls, type) and issubclass(cls, peft_ext.PeftConfig | peft_ext.AdapterDrop) and own_options(cls)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_option_is_described_on_one_page(config: type) -> None:
    pages = [text for text in map(text_of, PAGES) if f"### `{config.__name__}`\n" in text]
    assert len(pages) == 1
    assert [name for name in own_options(config) if f"`{name}`" not in pages[0]] == []
