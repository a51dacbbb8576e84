"""A coverage-guided fuzz of everything that reads an adapter's files.

A folder is written from the input, one of its files damaged, and read: bytes of it, or values of its JSON, which then
parses and has the readers look at what it says. It loads, or that is one of ERRORS; no code in a file runs; nothing
crashes, hangs or is left behind.

Usage: python tests/fuzz/loaders.py -runs=100000 [libFuzzer's options]        needs atheris
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["peft_ext.serialization", "peft_ext.tuners"]):
    import torch
    from torch import nn

    from peft_ext import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft_ext.serialization import adapterhub, hf_peft

ERRORS = (ValueError, TypeError, OSError)


class Bomb:
    """Pickled, it runs code where a reader lets it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(CANARY),)


WORK = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
CANARY = WORK / "code_ran"


def base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def seeds() -> list[dict[str, bytes]]:
    """Folders that load, and one that holds code."""
    torch.manual_seed(0)
    found = []
    for config in (LoraConfig(r=2, target_modules=["0"]), LoraConfig(r=2, target_modules=["0"], use_dora=True)):
        for safe in (True, False):
            folder = WORK / "seed"
            get_peft_model(base(), config).save_pretrained(folder, safe_serialization=safe)
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
            shutil.rmtree(folder)
    stream = io.BytesIO()
    pickle.dump({"base_model.model.0.lora_A.weight": Bomb()}, stream)
    found.append({**found[0], hf_peft.PICKLE_NAME: stream.getvalue()})
    del found[-1][hf_peft.SAFETENSORS_NAME]
    hub = {"version": "adapters.1.3.0", "config": {"architecture": "lora", "r": 2}, "name": "a", "hidden_size": 4}
    found.append(
        {adapterhub.ADAPTER.config: str(hub).replace("'", '"').encode()}
        | {adapterhub.ADAPTER.safetensors: found[0][hf_peft.SAFETENSORS_NAME]}
    )
    return found


SEEDS = seeds()


WORDS = [
    "LORA",
    "FLOAT",
    "F32",
    "BF16",
    "I64",
    "F8_E4M3",
    "none",
    "all",
    "lora_only",
    "all-linear",
    "0",
    "1",
    "relu",
    "",
]


def json_value(data: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    """A value as a file may have it, but of any kind."""
    kind = data.ConsumeIntInRange(0, 9 if depth < 2 else 7)
    if kind < 2:
        return data.PickValueInList([0, 1, 2, 4, 8, 16, -1, 2**31, 2**63, 10**30])
    if kind == 2:
        return data.ConsumeInt(8)
    if kind == 3:
        return data.PickValueInList([0.0, 0.5, -1.0, 1e300, float("inf"), float("nan")])
    if kind == 4:
        return data.PickValueInList([None, True, False])
    if kind < 7:
        return data.PickValueInList(WORDS)
    if kind == 7:
        return data.ConsumeUnicodeNoSurrogates(8)
    values = [json_value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))]
    return values if kind == 8 else {str(i): value for i, value in enumerate(values)}


def alter(document: Any, data: atheris.FuzzedDataProvider) -> Any:
    """Some of an object's entries have other values, other names, or are gone."""
    if not isinstance(document, dict):
        return json_value(data)
    document = dict(document)
    for _ in range(data.ConsumeIntInRange(1, 3)):
        name = data.PickValueInList([*sorted(document), data.ConsumeUnicodeNoSurrogates(4)])
        way = data.ConsumeIntInRange(0, 4)
        if way == 0:
            document.pop(name, None)
        elif way == 1:
            document[name + data.PickValueInList([".weight", ".default", "0", " "])] = document.pop(name, None)
        elif way == 2 and isinstance(document.get(name), dict):
            document[name] = alter(document[name], data)
        else:
            document[name] = json_value(data)
    return document


def altered(name: str, content: bytes, data: atheris.FuzzedDataProvider) -> bytes:
    """A file of JSON, or with a header of JSON, that says something else."""
    if name.endswith(".json"):
        return json.dumps(alter(json.loads(content), data)).encode()
    if not name.endswith(".safetensors"):
        return content
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(alter(json.loads(content[8 : 8 + length]), data)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damaged(data: atheris.FuzzedDataProvider) -> dict[str, bytes]:
    """A seed of which one file has other bytes, some replaced, cut off, put in, or all; or says something else."""
    files = dict(data.PickValueInList(SEEDS))
    name = data.PickValueInList(sorted(files))
    content = files[name]
    if data.ConsumeBool():
        files[name] = altered(name, content, data)
        return files
    for _ in range(data.ConsumeIntInRange(0, 4)):
        begin = data.ConsumeIntInRange(0, len(content))
        end = data.ConsumeIntInRange(begin, min(len(content), begin + 16))
        content = content[:begin] + data.ConsumeBytes(data.ConsumeIntInRange(0, 16)) + content[end:]
    way = data.ConsumeIntInRange(0, 8)
    if way == 0:
        content = content[: data.ConsumeIntInRange(0, len(content))]
    elif way == 1:
        content = data.ConsumeBytes(data.remaining_bytes())
    files[name] = content
    return files


def load_adapter(folder: Path) -> None:
    """What loads is what the file has."""
    model = PeftModel.from_pretrained(base(), folder)
    for tensor in get_peft_model_state_dict(model).values():
        assert tensor.isfinite().all(), "values that are not finite were accepted"


READERS: list[Callable[[Path], object]] = [
    load_adapter,
    PeftConfig.from_pretrained,
    hf_peft.read_weights,
    adapterhub.is_adapterhub,
    adapterhub.read,
]


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    read = provider.PickValueInList(READERS)
    folder = WORK / "folder"
    folder.mkdir()
    try:
        for name, content in damaged(provider).items():
            (folder / name).write_bytes(content)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            read(folder)
        except ERRORS as error:
            assert str(error), "an error without a message"
        assert not CANARY.exists(), "code in a file ran"
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, "reading changed the folder"
    finally:
        shutil.rmtree(folder)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=8192", *sys.argv[1:]], one_input)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
