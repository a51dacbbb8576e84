"""Labelled text from CSV and JSONL files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peft_ext.cli.errors import CliError


class Example(NamedTuple):
    """One row: a text and, for classification, its label."""

    text: str
    label: str | None = None


def read_examples(path: Path, text_column: str, label_column: str | None) -> list[Example]:
    """Reads every row of a ``.csv``, ``.jsonl`` or ``.json`` (one object a line) file.

    Raises:
        CliError: for a missing or empty file, an unknown format, a missing column, or an empty
            cell; names the line.
    """
    if not path.is_file():
        raise CliError(f"data file {path} does not exist")
    columns = [text_column] if label_column is None else [text_column, label_column]
    examples = [Example(*_cells(path, line, row, columns)) for line, row in _rows(path)]
    if not examples:
        raise CliError(f"data file {path} has no rows")
    return examples


def write_csv(path: Path, examples: Iterable[Example]) -> None:
    """Writes rows so that :func:`read_examples` reads them by its default columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Example._fields)
        writer.writerows(examples)


def sample(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """At most ``limit`` rows, drawn by ``seed``, in a random order."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def hold_out(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Splits off the last ``fraction`` of the rows, at least one on each side."""
    if len(examples) < 2:
        raise CliError("one row cannot be split into training and evaluation rows: pass --eval FILE or more rows")
    held = min(max(round(len(examples) * fraction), 1), len(examples) - 1)
    return list(examples[:-held]), list(examples[-held:])


def label_names(examples: Iterable[Example]) -> list[str]:
    """The classes, sorted.

    Raises:
        CliError: if there are fewer than two.
    """
    labels = sorted({example.label for example in examples if example.label is not None})
    if len(labels) < 2:
        raise CliError(f"the training rows have only one label, {labels}: classification needs two or more")
    return labels


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise CliError(f"data file {path} is neither .csv nor .jsonl")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise CliError(f"data file {path} is not UTF-8: {error}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, dict(row)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CliError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise CliError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield number, row


def _cells(path: Path, line: int, row: dict[str, object], columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        if column not in row:
            found = ", ".join(map(str, row)) or "none"
            raise CliError(
                f"{path}, line {line}: no column {column!r} (found: {found}); "
                "name the columns with --text-column and --label-column"
            )
        value = row[column]
        if value is None or not str(value).strip():
            raise CliError(f"{path}, line {line}: column {column!r} is empty")
        yield str(value)
