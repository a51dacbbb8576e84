"""A labelled text set that every machine has: the docstrings of Python's standard library.

The task is to tell the topic of a docstring. Sources are parsed, never imported, so building the
set has no side effects and gives the same rows in the same order on every run of one Python
version.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from peft_ext.cli.data import Example
from peft_ext.cli.errors import CliError

TOPICS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        "asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "sched", "selectors", "subprocess",
        "threading",
    ),
    "files": (
        "bz2", "filecmp", "fileinput", "fnmatch", "genericpath", "glob", "gzip", "lzma", "ntpath", "os", "pathlib",
        "posixpath", "_pyio", "shutil", "stat", "tarfile", "tempfile", "zipfile",
    ),
    "introspection": (
        "abc", "ast", "copyreg", "dis", "enum", "importlib", "inspect", "modulefinder", "pickle", "pickletools",
        "pkgutil", "pyclbr", "symtable", "tokenize", "types", "typing",
    ),
    "mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "markup": ("html", "json", "_markupbase", "plistlib", "xml"),
    "numbers": (
        "bisect", "colorsys", "decimal", "fractions", "heapq", "numbers", "_pydecimal", "_pylong", "random",
        "statistics",
    ),
    "testing": (
        "bdb", "cProfile", "doctest", "pdb", "profile", "pstats", "timeit", "trace", "traceback", "tracemalloc",
        "unittest",
    ),
    "web": (
        "ftplib", "http", "ipaddress", "socket", "socketserver", "ssl", "urllib", "webbrowser", "wsgiref", "xmlrpc",
    ),
}  # fmt: skip

MAX_CHARACTERS = 240
MIN_WORDS = 5
SKIPPED_FOLDERS = {"test", "tests", "__pycache__"}
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MODULE_NAMES = frozenset(name.lower().lstrip("_") for names in TOPICS.values() for name in names)


def build(
    train_rows: int = 120, test_rows: int = 40, stdlib: Path | None = None
) -> tuple[list[Example], list[Example]]:
    """Builds a balanced training and test set.

    A class and its methods, or a function, go wholly to one side, so no test text describes an
    object that was trained on. Texts that occur twice in the library are left out, and so is every
    word that names a module of the table: it would give the answer away.

    Args:
        train_rows: rows of each topic for training.
        test_rows: rows of each topic for testing.
        stdlib: folder of the standard library; by default that of the running Python.

    Raises:
        CliError: if a topic has too few docstrings (a Python without its sources).
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    objects = {topic: _documented_objects(folder, topic) for topic in TOPICS}
    repeated = _repeated_texts(objects)
    train: list[Example] = []
    test: list[Example] = []
    for topic, texts_of in objects.items():
        held, kept = _split(texts_of, repeated, test_rows)
        if len(held) < test_rows or len(kept) < train_rows:
            raise CliError(
                f"{folder} has too few docstrings on {topic!r} ({len(kept)} + {len(held)}, "
                f"needs {train_rows} + {test_rows}): this Python came without its sources"
            )
        test += [Example(text, topic) for text in held[:test_rows]]
        train += [Example(text, topic) for text in kept[:train_rows]]
    return train, test


def clean(docstring: str) -> str:
    """The prose of a docstring in one line: no doctests, no module names, no rules of dashes."""
    prose = docstring.split(">>>")[0]
    words = (word for word in prose.split() if re.search(r"\w", word) and not _names_a_module(word))
    return textwrap.shorten(" ".join(words), MAX_CHARACTERS, placeholder="")


def _names_a_module(word: str) -> bool:
    return any(part.lower().lstrip("_") in MODULE_NAMES for part in re.findall(r"[^\W\d]\w*", word))


def _documented_objects(folder: Path, topic: str) -> dict[str, list[str]]:
    """Cleaned docstrings by the top-level object that they belong to."""
    objects: dict[str, list[str]] = {}
    for path in _sources(folder, topic):
        module = path.relative_to(folder).as_posix()
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, DOCUMENTED):
                objects[f"{module}:{node.name}"] = list(_docstrings(node))
    return objects


def _sources(folder: Path, topic: str) -> Iterator[Path]:
    for name in TOPICS[topic]:
        single = folder / f"{name}.py"
        if single.is_file():
            yield single
        for path in sorted((folder / name).rglob("*.py")):
            if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts):
                yield path


def _docstrings(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, DOCUMENTED):
            text = clean(ast.get_docstring(child) or "")
            if len(text.split()) >= MIN_WORDS:
                yield text


def _repeated_texts(objects: dict[str, dict[str, list[str]]]) -> set[str]:
    count: dict[str, int] = defaultdict(int)
    for texts_of in objects.values():
        for texts in texts_of.values():
            for text in texts:
                count[text.lower()] += 1
    return {text for text, times in count.items() if times > 1}


def _split(texts_of: dict[str, list[str]], repeated: set[str], test_rows: int) -> tuple[list[str], list[str]]:
    """Objects in the order of their hash; each goes to the test side while it fits there."""
    held: list[str] = []
    kept: list[str] = []
    for key in sorted(texts_of, key=lambda name: sha256(name.encode()).digest()):
        texts = [text for text in texts_of[key] if text.lower() not in repeated]
        side = held if len(held) + len(texts) <= test_rows else kept
        side += texts
    return held, kept
