"""Checkpoints and parameter names against real Hugging Face PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_ext
from peft_ext.serialization import atomic

peft = pytest.importorskip("peft")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*embedding layers"),
    pytest.mark.filterwarnings("ignore:.*share their weight"),
    pytest.mark.filterwarnings("ignore:modules_to_save"),
]

CASES = [
    ("bert", {}),
    ("bert", {"task_type": "SEQ_CLS"}),
    ("bert", {"task_type": "SEQ_CLS", "bias": "all"}),
    ("bert", {"bias": "lora_only", "target_modules": "all-linear"}),
    ("bert", {"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"layer.0.attention.self.value": 5}}),
    ("bert", {"target_modules": r".*layer\.1.*(query|key)", "use_dora": True}),
    ("bert", {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["pooler.dense"]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"], "layers_to_transform": [1]}),
    ("bert", {"task_type": "SEQ_CLS", "target_modules": "dummy-target-modules"}),
    ("gpt2", {}),
    ("gpt2", {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_fc", "c_proj"], "bias": "all"}),
    ("gpt2", {"use_dora": True}),
    ("gpt2", {"target_modules": ["wte", "wpe"]}),
    ("gpt2", {"target_modules": "all-linear", "modules_to_save": ["ln_f"]}),
    ("llama", {}),
    ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("mlp", {"target_modules": ["0", "4"]}),
    ("mlp", {"target_modules": ["0", "2"], "modules_to_save": ["4"], "use_dora": True}),
    ("mlp", {"target_modules": ["0"], "init_lora_weights": "pissa"}),
    ("mlp", {"target_modules": ["0"], "init_lora_weights": "olora"}),
    ("mlp", {"target_modules": ["0"], "init_lora_weights": "orthogonal"}),
    ("mlp", {"target_modules": ["0"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    ("bert", {"task_type": "SEQ_CLS", "use_dora": True, "use_rslora": True, "rank_pattern": {"value": 3}}),
]


def _randomise(model: nn.Module) -> None:
    """Moves everything trainable, so that nothing that is lost on the way goes unseen."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _pair(base: nn.Module, arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **arguments)).eval()
    ours = peft_ext.get_peft_model(copy.deepcopy(base), peft_ext.LoraConfig(r=4, **arguments)).eval()
    return theirs, ours


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_parameters_have_the_same_names_shapes_dtypes_and_flags(
    tiny: Make, kind: str, arguments: dict[str, Any]
) -> None:
    theirs, ours = _pair(tiny(kind), arguments)
    described = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (theirs, ours)]
    assert described[0] == described[1]
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert theirs.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_peft_loads_ours(tiny: Make, run: Run, tmp_path: Path, kind: str, arguments: dict[str, Any]) -> None:
    base = tiny(kind)
    _, ours = _pair(base, arguments)
    _randomise(ours)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(loaded), run(ours), rtol=1e-6, atol=1e-6)
    assert (run(ours) - run(base)).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_we_load_pefts(tiny: Make, run: Run, tmp_path: Path, kind: str, arguments: dict[str, Any]) -> None:
    base = tiny(kind)
    theirs, ours = _pair(base, arguments)
    _randomise(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = peft_ext.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(loaded), run(theirs), rtol=1e-6, atol=1e-6)
    assert type(loaded).__name__ == type(theirs).__name__

    # and what we write has the very same keys, but for frozen biases that PEFT adds
    ours.load_adapter(tmp_path, "default")
    ours.save_pretrained(tmp_path / "ours")
    keys = [load_file(folder / "adapter_model.safetensors").keys() for folder in (tmp_path, tmp_path / "ours")]
    assert keys[1] == {key for key in keys[0] if "original_module" not in key and "modules_to_save" not in key}


def test_conv2d_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    theirs, ours = _pair(base, {"target_modules": ["0", "2"]})
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    _randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), ours(x), rtol=1e-6, atol=1e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    back = peft_ext.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(back(x), ours(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_conv2d_equals_peft(groups: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups)).eval()
    theirs, ours = _pair(base, {"target_modules": ["0"]})
    _randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_several_adapters_both_ways(tiny: Make, run: Run, tmp_path: Path) -> None:
    base = tiny("bert")
    _, ours = _pair(base, {"task_type": "SEQ_CLS"})
    ours.add_adapter("other", peft_ext.LoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS"))
    outputs = {}
    for name in ("default", "other"):
        ours.set_adapter(name)
        _randomise(ours)
        outputs[name] = run(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "other" / "adapter_config.json").is_file()

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    theirs.load_adapter(tmp_path / "ours" / "other", "other")
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft_ext.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    again.load_adapter(tmp_path / "theirs" / "other", "other")
    for name, expected in outputs.items():
        for model in (theirs, again):
            model.set_adapter(name)
            torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)


def test_two_active_adapters_equal_peft(tiny: Make, run: Run) -> None:
    theirs, ours = _pair(tiny("llama"), {"init_lora_weights": False})
    for model, library in ((theirs, peft), (ours, peft_ext)):
        model.add_adapter("other", library.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
        model.base_model.set_adapter(["default", "other"])
    _randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}])
def test_gradients_equal_pefts(tiny: Make, run: Run, arguments: dict[str, Any]) -> None:
    theirs, ours = _pair(tiny("llama"), {"target_modules": "all-linear", **arguments})
    _randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        run(model).square().sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_merged_weights_equal_pefts(tiny: Make) -> None:
    for kind, arguments in (("gpt2", {}), ("gpt2", {"use_dora": True}), ("mlp", {"target_modules": "all-linear"})):
        theirs, ours = _pair(tiny(kind), arguments)
        _randomise(theirs)
        ours.load_state_dict(theirs.state_dict())
        wanted, found = theirs.merge_and_unload().state_dict(), ours.merge_and_unload().state_dict()
        assert wanted.keys() == found.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


def test_configs_are_each_others() -> None:
    ours = peft_ext.LoraConfig(r=3, target_modules=["a", "b"], task_type="CAUSAL_LM", rank_pattern={"a": 5})
    theirs = peft.LoraConfig(**ours.to_dict())
    assert theirs.r == 3
    assert theirs.target_modules == {"a", "b"}
    assert peft_ext.LoraConfig(**theirs.to_dict()).to_dict() == {**ours.to_dict(), "peft_version": peft.__version__}
    assert peft_ext.LoraConfig().to_dict().keys() == peft.LoraConfig().to_dict().keys()


def test_defaults_of_architectures_are_pefts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    from peft_ext.tuners.targets import DEFAULT_TARGETS

    shared = DEFAULT_TARGETS.keys() & theirs.keys()
    assert len(shared) > 20
    assert all(set(DEFAULT_TARGETS[name]) == set(theirs[name]) for name in shared)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny: Make, tmp_path: Path) -> Path:
    _, ours = _pair(tiny("mlp"), {"target_modules": ["0", "2"]})
    _randomise(ours)
    ours.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _load(tiny: Make, snapshot: Any, same: Any, folder: Path, error: type[Exception], match: str) -> None:
    """Loading fails with this message, into a new model and beside another adapter, and changes nothing."""
    base = tiny("mlp")
    before = snapshot(base)
    with pytest.raises(error, match=match):
        peft_ext.PeftModel.from_pretrained(base, folder)
    assert same(base, before)

    model = peft_ext.get_peft_model(base, peft_ext.LoraConfig(target_modules=["0", "4"]))
    before = snapshot(model)
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "second")
    assert same(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("tenths", range(10))
def test_truncated_weights(tiny: Make, snapshot: Any, same: Any, saved: Path, tenths: int) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * tenths // 10])
    _load(tiny, snapshot, same, saved, ValueError, "adapter_model.safetensors is truncated or damaged")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("missing", r"missing keys: base_model\.model\.0\.lora_A\.weight$"),
        ("unexpected", r"unexpected keys: base_model\.model\.9\.lora_A\.weight$"),
        ("shape", r"base_model\.model\.0\.lora_A\.weight has shape \(2, 8\) instead of \(4, 8\)$"),
        ("dtype", r"base_model\.model\.0\.lora_A\.weight has dtype torch.int64 instead of torch.float32$"),
    ],
)
def test_weights_that_do_not_fit(tiny: Make, snapshot: Any, same: Any, saved: Path, change: str, match: str) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    key = "base_model.model.0.lora_A.weight"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["base_model.model.9.lora_A.weight"] = torch.zeros(1)
    elif change == "shape":
        tensors[key] = tensors[key][:2].clone()
    else:
        tensors[key] = tensors[key].long()
    save_file(tensors, saved / "adapter_model.safetensors")
    _load(tiny, snapshot, same, saved, ValueError, match)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"peft_type": "MAGIC"}, ValueError, "peft_type is 'MAGIC', which is not supported"),
        ({"task_type": "DREAM"}, ValueError, "task_type is 'DREAM'"),
        ({"r": "8"}, ValueError, "rank 'r' must be an integer > 0, got '8'"),
        ({"lora_bias": True}, ValueError, "lora_bias=True is not supported"),
        ({"target_modules": ["nothing"]}, ValueError, r"\['nothing'\] matches no module"),
        ({"r": 2}, ValueError, "has shape"),
    ],
)
def test_configs_that_do_not_fit(
    tiny: Make, snapshot: Any, same: Any, saved: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    _edit_config(saved, **changes)
    _load(tiny, snapshot, same, saved, error, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("{}", "has no 'peft_type'"),
        ('{"version": "adapters.9.0.0", "config": {}}', "version is 'adapters.9.0.0', which is not supported"),
    ],
)
def test_files_that_are_no_config(tiny: Make, snapshot: Any, same: Any, saved: Path, text: str, match: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    _load(tiny, snapshot, same, saved, ValueError, match)


def test_missing_files(tiny: Make, snapshot: Any, same: Any, saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    _load(tiny, snapshot, same, saved, FileNotFoundError, "no adapter_model.safetensors or adapter_model.bin")
    (saved / "adapter_config.json").unlink()
    _load(tiny, snapshot, same, saved, FileNotFoundError, "no adapter_config.json")
    _load(tiny, snapshot, same, saved / "none", FileNotFoundError, "no adapter folder")


def test_bin_files_hold_tensors_only(tiny: Make, run: Run, snapshot: Any, same: Any, saved: Path) -> None:
    expected = run(peft_ext.PeftModel.from_pretrained(tiny("mlp"), saved))
    model = peft_ext.PeftModel.from_pretrained(tiny("mlp"), saved)
    model.save_pretrained(saved, safe_serialization=False)
    assert not (saved / "adapter_model.safetensors").exists()
    assert torch.equal(run(peft_ext.PeftModel.from_pretrained(tiny("mlp"), saved)), expected)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(tiny("mlp"), saved)), expected)

    written = (saved / "adapter_model.bin").read_bytes()
    model.save_pretrained(saved, safe_serialization=False)
    assert (saved / "adapter_model.bin").read_bytes() == written

    torch.save({"code": Path}, saved / "adapter_model.bin")
    _load(tiny, snapshot, same, saved, ValueError, "holds more than tensors")
    torch.save([torch.zeros(1)], saved / "adapter_model.bin")
    _load(tiny, snapshot, same, saved, ValueError, "must hold a dict of tensors")


def test_unknown_fields_are_kept_and_warned_of(tiny: Make, saved: Path, tmp_path: Path) -> None:
    _edit_config(saved, from_the_future={"a": 1}, harmless=None)
    with pytest.warns(UserWarning, match=r"unknown here and ignored: \['from_the_future'\]"):
        model = peft_ext.PeftModel.from_pretrained(tiny("mlp"), saved)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["from_the_future"] == {"a": 1}
    assert written["harmless"] is None
    assert written["inference_mode"] is True
    assert written["auto_mapping"] == {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}


def test_a_failed_save_leaves_the_checkpoint(
    tiny: Make, run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft_ext.PeftModel.from_pretrained(tiny("mlp"), saved, is_trainable=True)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    _randomise(model)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_resized_embeddings_are_saved(tiny: Make, tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53)
    ours = peft_ext.get_peft_model(base, peft_ext.LoraConfig())
    keys = peft_ext.get_peft_model_state_dict(ours).keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys
    assert keys == peft_ext.get_peft_model_state_dict(ours, save_embedding_layers=True).keys()
    assert not any("embed" in key for key in peft_ext.get_peft_model_state_dict(ours, save_embedding_layers=False))


def test_the_hub_gets_the_adapter_alone(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_ext.get_peft_model(tiny("bert"), peft_ext.LoraConfig(r=2))
    sent: dict[str, Any] = {}

    def upload_folder(self: Any, *, folder_path: str, **kwargs: Any) -> SimpleNamespace:
        sent.update(kwargs, files=sorted(path.name for path in Path(folder_path).iterdir()))
        return SimpleNamespace(commit_url="commit")

    repo = SimpleNamespace(repo_id="owner/name")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    assert model.push_to_hub("name", revision="v1") == "commit"
    assert sent["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert (sent["repo_id"], sent["revision"], sent["create_pr"]) == ("owner/name", "v1", False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02h\x09.",
        b"\x80\x020.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02}K\x01K\x02K\x03\x87.",
        b"PK\x03\x04",
    ],
    ids=["empty", "unknown-memo", "empty-stack", "not-utf8", "no-state-dict", "zip"],
)
def test_damaged_bin_files(tiny: Make, snapshot: Any, same: Any, saved: Path, content: bytes) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(content)
    _load(tiny, snapshot, same, saved, ValueError, "adapter_model.bin is damaged, or holds more than tensors")


@pytest.mark.parametrize(
    "content",
    [
        {1: torch.ones(2)},
        {"a": {"b": torch.ones(2)}},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
    ],
    ids=["number", "nested", "sparse", "meta"],
)
def test_bin_files_of_other_things(tiny: Make, snapshot: Any, same: Any, saved: Path, content: Any) -> None:
    (saved / "adapter_model.safetensors").unlink()
    torch.save(content, saved / "adapter_model.bin")
    _load(tiny, snapshot, same, saved, ValueError, "must hold a dict of tensors by name")
