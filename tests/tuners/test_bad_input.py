"""Files and names that are wrong, drawn for every method: a named error, and the model and the files as they were."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_ext import (
    AdapterFusionConfig,
    BitFitConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    HoulsbyConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SideTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_ext.tuners.state_dict import adapter_entries

transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ERRORS = (ValueError, TypeError, FileNotFoundError)

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=2, task_type="SEQ_CLS"),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=["query"]),
    "lokr": lambda: LoKrConfig(r=2),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
    "projected prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "houlsby": lambda: HoulsbyConfig(bottleneck_dim=4, modules_to_save=["classifier"]),
    "pfeiffer": lambda: PfeifferConfig(bottleneck_dim=4),
    "compacter": lambda: CompacterConfig(bottleneck_dim=4),
    "compacter++": lambda: CompacterPlusPlusConfig(bottleneck_dim=4),
    "fusion": lambda: AdapterFusionConfig(adapters=[str(saved("pfeiffer")), str(saved("pfeiffer"))]),
    "bitfit": lambda: BitFitConfig(),
    "side": lambda: SideTuningConfig(num_layers=1, modules_to_save=["classifier"]),
}
methods = pytest.mark.parametrize("method", METHODS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:modules_to_save"),
    pytest.mark.filterwarnings("ignore:the configuration has fields"),
    pytest.mark.filterwarnings("ignore:r exceeds"),
]


@pytest.fixture(autouse=True, scope="module")
def scratch() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        SCRATCH.append(Path(folder))
        yield
    for cached in (saved, tensors_of, subject):
        cached.cache_clear()


SCRATCH: list[Path] = []


def build(hidden_size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForSequenceClassification(config).eval()


PRISTINE = build()


def base() -> nn.Module:
    return copy.deepcopy(PRISTINE)


@cache
def saved(method: str) -> Path:
    """The folder of an adapter of this method."""
    folder = SCRATCH[-1] / method.replace(" ", "-")
    model = get_peft_model(base(), METHODS[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@cache
def tensors_of(method: str) -> dict[str, Tensor]:
    return load_file(saved(method) / WEIGHTS)


def state(model: Any) -> dict[str, Any]:
    """All of a model that a failing call must leave."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "parameters": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "active": [getattr(module, "active_adapters", None) for module in model.modules()],
        "adapters": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "values": {name: value.detach().clone() for name, value in model.state_dict().items()},
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    after = state(model)
    values = before["values"]
    return all(after[key] == before[key] for key in before if key != "values") and all(
        value.dtype == values[name].dtype and torch.equal(value, values[name])
        for name, value in after["values"].items()
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged_copy(method: str, folder: str, changes: Callable[[Path], None]) -> Path:
    copied = Path(folder) / "adapter"
    shutil.copytree(saved(method), copied)
    changes(copied)
    return copied


class Subject:
    """A model, with and without an adapter, and how to load into it; made anew only once something has been loaded."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.renew()

    def renew(self) -> None:
        self.plain, self.adapted = base(), get_peft_model(base(), METHODS[self.method](), "there")
        self.before = state(self.plain), state(self.adapted)

    def loads(self, folder: Path) -> list[Callable[[], object]]:
        return [
            lambda: PeftModel.from_pretrained(self.plain, folder, is_trainable=True),
            lambda: self.adapted.load_adapter(folder, "there", is_trainable=True),
            lambda: self.adapted.load_adapter(folder, "new", is_trainable=True),
        ]

    def message(self, load: Callable[[], object]) -> str | None:
        """What a refusal says, which changes nothing; None if it loads."""
        try:
            load()
        except ERRORS as error:
            assert type(error) in ERRORS
            assert unchanged(self.plain, self.before[0])
            assert unchanged(self.adapted, self.before[1])
            return str(error)
        self.renew()
        return None


subject = cache(Subject)


def outcomes(method: str, changes: Callable[[Path], None]) -> list[str | None]:
    """What each way of loading says of a changed copy of the adapter, None where it loads; the files stay."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = damaged_copy(method, temporary, changes)
        files = contents(Path(temporary))
        messages = [subject(method).message(load) for load in subject(method).loads(folder)]
        assert contents(Path(temporary)) == files
    return messages


def refusals(method: str, changes: Callable[[Path], None]) -> list[str]:
    """What each way of loading says of a damaged copy of the adapter, which all of them refuse."""
    messages = [message for message in outcomes(method, changes) if message is not None]
    assert len(messages) == 3
    return messages


def truncate(name: str, tenths: int) -> Callable[[Path], None]:
    def changes(folder: Path) -> None:
        path = folder / name
        os.truncate(path, path.stat().st_size * tenths // 10)

    return changes


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


@methods
def test_undamaged_folders_load(method: str) -> None:
    for changes in (lambda folder: None, as_pickle):
        with tempfile.TemporaryDirectory() as temporary:
            folder = damaged_copy(method, temporary, changes)
            loaded = PeftModel.from_pretrained(base(), folder)
            found = get_peft_model_state_dict(loaded)
            assert found["prompt_embeddings"].shape if "prompt_embeddings" in found else True
            assert all(torch.equal(found[key], tensors_of(method)[key]) for key in found)
            model = get_peft_model(base(), METHODS[method](), "there")
            model.load_adapter(folder, "new")
            model.load_adapter(folder, "there")


@methods
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PICKLE])
def test_truncated_files(method: str, name: str) -> None:
    for tenths in range(10):

        def changes(folder: Path, tenths: int = tenths) -> None:
            if name == PICKLE:
                as_pickle(folder)
            truncate(name, tenths)(folder)

        for message in refusals(method, changes):
            assert name in message


class Payload:
    """Runs code when it is unpickled without a guard."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@methods
def test_code_in_a_pickle_is_refused_and_not_run(method: str, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for new_zipfile in (True, False):

        def changes(folder: Path, new_zipfile: bool = new_zipfile) -> None:
            tensors = {**load_file(folder / WEIGHTS), "more": Payload(witness)}
            torch.save(tensors, folder / PICKLE, _use_new_zipfile_serialization=new_zipfile)
            (folder / WEIGHTS).unlink()

        for message in refusals(method, changes):
            assert PICKLE in message
    assert not witness.exists()


@methods
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(method: str, name: str) -> None:
    for message in refusals(method, lambda folder: (folder / name).unlink()):
        assert name in message


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@methods
@pytest.mark.parametrize("value", ["MAGIC", None, 3, ["LORA"], {}])
def test_unknown_peft_types(method: str, value: Any) -> None:
    for message in refusals(method, lambda folder: edit_config(folder, peft_type=value)):
        assert "peft_type" in message


drawn = settings(
    derandomize=True, phases=[Phase.generate], deadline=None, max_examples=8, suppress_health_check=list(HealthCheck)
)
words = st.text("abc._*[(", max_size=4)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 300, -1.5, 0.5, float("nan"), float("inf"), 1e308]),
    words,
    st.lists(st.one_of(words, st.integers(-2, 2), st.none()), max_size=2),
    st.dictionaries(words, st.one_of(words, st.integers(-2, 2), st.none(), st.just(float("nan"))), max_size=2),
)


@methods
@settings(drawn, max_examples=15)
@given(data=st.data())
def test_fields_of_any_value(method: str, data: st.DataObject) -> None:
    """A configuration with one odd field loads, or it is refused by name."""
    fields = sorted(json.loads((saved(method) / CONFIG).read_text()).keys() - {"peft_type"})
    field, value = data.draw(st.sampled_from(fields)), data.draw(junk)
    for message in outcomes(method, lambda folder: edit_config(folder, **{field: value})):
        if message is not None:
            named = [field, *value] if isinstance(value, dict) else [field]  # of a pattern, its key is named
            assert any(name in message for name in named) or "does not fit" in message, message


def damage(data: st.DataObject, tensors: dict[str, Tensor]) -> str:
    """Does something to one of an adapter's tensors after which they cannot be loaded; returns what must be named."""
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[key]
    kind = data.draw(st.sampled_from(["missing", "renamed", "more", "longer", "deeper", "empty", "dtype", "value"]))
    if kind == "missing":
        del tensors[key]
    elif kind == "renamed":
        tensors[key + ".odd"] = tensors.pop(key)
    elif kind == "more":
        key = data.draw(st.sampled_from(["odd", key + ".odd", "base_model.model.odd.lora_A.weight", ""]))
        tensors[key] = torch.zeros(1)
    elif kind == "longer":
        tensors[key] = torch.cat([tensor.reshape(-1), torch.zeros(1)])
    elif kind == "deeper":
        tensors[key] = tensor[None].clone()
    elif kind == "empty":
        tensors[key] = torch.zeros(0)
    elif kind == "dtype":
        tensors[key] = tensor.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.uint8, torch.complex64])))
    else:
        place = data.draw(st.integers(0, tensor.numel() - 1))
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    return key


@methods
@drawn
@given(data=st.data())
def test_tensors_that_do_not_fit(method: str, data: st.DataObject) -> None:
    tensors = dict(tensors_of(method))
    key = damage(data, tensors)
    pickled = data.draw(st.booleans())

    def changes(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        if pickled:
            torch.save(tensors, folder / PICKLE)
        else:
            save_file(tensors, folder / WEIGHTS)

    for message in refusals(method, changes):
        assert key in message
    message = subject(method).message(lambda: set_peft_model_state_dict(subject(method).adapted, tensors, "there"))
    assert message is not None
    assert key in message


def wide_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()


BASES: dict[str, Callable[[Any], nn.Module]] = {
    "wider": lambda tiny: build(32),
    "gpt2": lambda tiny: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)
    ),
    "mlp": lambda tiny: tiny("mlp"),
}


@methods
@pytest.mark.parametrize("other", BASES)
def test_adapters_for_another_base(method: str, other: str, tiny: Any) -> None:
    model = BASES[other](tiny)
    before = state(model)
    with pytest.raises(ERRORS) as raised:
        PeftModel.from_pretrained(model, saved(method), is_trainable=True)
    assert type(raised.value) in ERRORS
    assert len(str(raised.value)) > 20
    assert unchanged(model, before)


def calls(model: PeftModel, name: Any, folder: Path) -> dict[str, Callable[[], object]]:
    """Everything that takes the name of an adapter that the model has."""
    return {
        "set_adapter": lambda: model.set_adapter(name),
        "set_adapter, a list": lambda: model.set_adapter(["there", name]),
        "delete_adapter": lambda: model.delete_adapter(name),
        "set_requires_grad": lambda: model.set_requires_grad(name),
        "merge_adapter": lambda: model.merge_adapter([name]),
        "merge_and_unload": lambda: model.merge_and_unload(adapter_names=["there", name]),
        "merge_report": lambda: model.merge_report(adapter_names=[name]),
        "save_pretrained": lambda: model.save_pretrained(folder, selected_adapters=["there", name]),
        "get_peft_model_state_dict": lambda: get_peft_model_state_dict(model, adapter_name=name),
        "set_peft_model_state_dict": lambda: set_peft_model_state_dict(model, {}, name),
        "config_of": lambda: model.config_of(name),
    }


@methods
@settings(drawn, max_examples=4)
@given(name=st.one_of(st.text(max_size=5), st.sampled_from(["default", "There", "there ", None, 0])))
def test_names_that_no_adapter_has(method: str, name: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for kind, call in calls(subject(method).adapted, name, Path(temporary) / "new").items():
            message = subject(method).message(call)
            assert message is not None, kind
            cannot_merge = "merge" in kind and ("cannot be merged" in message or "could be merged" in message)
            refused = "there is no adapter" in message or re.search("adapter_names? must be", message)
            assert refused or cannot_merge, (kind, message)
            assert not any(Path(temporary).iterdir())


@methods
def test_names_given_twice(method: str, tmp_path: Path) -> None:
    model = subject(method).adapted
    folder = tmp_path / "new"
    for call, match in (
        (lambda: model.add_adapter("there", METHODS[method]()), "there is an adapter 'there' already"),
        (lambda: model.set_adapter(["there", "there"]), "adapter_name must name each adapter once"),
        (lambda: model.merge_adapter(["there", "there"]), "adapter_names must name each adapter once|merged"),
        (
            lambda: model.save_pretrained(folder, selected_adapters=["there", "there"]),
            "selected_adapters must name each adapter once",
        ),
        (lambda: model.save_pretrained(folder, selected_adapters="there"), "selected_adapters must be a list of names"),
        (lambda: get_peft_model(model.get_base_model(), METHODS[method]()), "has adapters in it already"),
        (lambda: PeftModel.from_pretrained(model.get_base_model(), saved(method)), "has adapters in it already"),
    ):
        message = subject(method).message(call)
        assert message is not None
        assert re.search(match, message), message
    assert not folder.exists()


@methods
@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", "keys", None, 3, ["a"]])
def test_names_that_no_adapter_can_have(method: str, name: Any) -> None:
    for call in (
        lambda: get_peft_model(subject(method).plain, METHODS[method](), name),
        lambda: PeftModel.from_pretrained(subject(method).plain, saved(method), name),
        lambda: subject(method).adapted.add_adapter(name, METHODS[method]()),
        lambda: subject(method).adapted.load_adapter(saved(method), name),
    ):
        message = subject(method).message(call)
        assert message is not None
        assert "adapter_name" in message


@methods
def test_values_that_are_no_tensors(method: str) -> None:
    key = min(tensors_of(method))
    for value in (None, 1.0, [0.0], "text"):
        tensors = {**tensors_of(method), key: value}
        model = subject(method).adapted
        message = subject(method).message(partial(set_peft_model_state_dict, model, tensors, "there"))
        assert message is not None
        assert f"{key} is a {type(value).__name__} instead of a tensor" in message


@methods
def test_a_gathered_state_dict_that_lacks_a_tensor(method: str) -> None:
    model = subject(method).adapted
    gathered = model.state_dict()
    entries = adapter_entries(model.get_base_model(), model.config_of("there"), "there")
    del gathered[next(entry.model_key for entry in entries if entry.model_key is not None)]
    message = subject(method).message(lambda: get_peft_model_state_dict(model, gathered, "there"))
    assert message is not None
    assert "state_dict lacks tensors of adapter 'there': missing keys: " in message
