"""A tiny classifier, a tiny language model, data that they can learn, and a runner for commands."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from peft_ext.cli import app

transformers = pytest.importorskip("transformers")

GOOD = ("good", "great", "fine", "lovely")
BAD = ("bad", "awful", "poor", "dull")
NOUNS = ("film", "book", "song", "play")
WORDS = ("a", "the", "is", "was", "very", *GOOD, *BAD, *NOUNS)

Run = Callable[..., Result]


@pytest.fixture
def command() -> Run:
    """Runs ``peft-ext`` with the given arguments in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT of random weights with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.1,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPT-2 of random weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def rows() -> list[tuple[str, str]]:
    """Text and label; the adjective decides."""
    kinds = [(adjective, "pos") for adjective in GOOD] + [(adjective, "neg") for adjective in BAD]
    return [
        (f"the {noun} {verb} {adjective}", label)
        for (adjective, label), noun, verb in itertools.product(kinds, NOUNS, ("is", "was"))
    ]


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    write_csv(path, [("text", "label"), *rows])
    return path


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"review": text, "stars": label}) + "\n" for text, label in rows))
    return path


def write_csv(path: Path, lines: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
