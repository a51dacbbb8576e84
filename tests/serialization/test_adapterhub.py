"""AdapterHub's format against the real library: its files and outputs, and what it makes of ours.

The files under data/adapterhub are real AdapterHub's, written by adapterhub_peer.py. Where the environment variable
PEFT_EXT_ADAPTERHUB_PYTHON names an interpreter that has it, they are written anew, and it reads ours.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_ext
from peft_ext.serialization import adapterhub
from peft_ext.tuners.adapterhub.layouts import Report
from peft_ext.tuners.adapterhub.reading import from_adapterhub
from peft_ext.tuners.conversion import convert

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parent / "data" / "adapterhub"
PEER = Path(__file__).parent / "adapterhub_peer.py"
PYTHON = os.environ.get("PEFT_EXT_ADAPTERHUB_PYTHON") or None
OUTPUTS = load_file(DATA / "outputs.safetensors")
CASES = sorted(OUTPUTS)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLASSES = {
    "bert-bare": "BertModel",
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
Snapshot = Callable[[nn.Module], Any]
Same = Callable[[nn.Module, Any], bool]


def _base_of(case: str) -> str:
    return next(base for base in CLASSES if case.startswith(f"{base}-"))


def _base(name: str) -> Any:
    return copy.deepcopy(_read_base(name))


@cache
def _read_base(name: str) -> Any:
    model = getattr(transformers, CLASSES[name]).from_pretrained(DATA / "bases" / name, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def _output(model: Any) -> Tensor:
    """As ``output`` of adapterhub_peer.py has it."""
    ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    result = model.eval()(input_ids=ids, attention_mask=mask)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def _load(case: str, folder: Path = DATA) -> peft_ext.PeftModel:
    return peft_ext.PeftModel.from_pretrained(_base(_base_of(case)), folder / case)


def _moved(case: str) -> bool:
    """Whether the adapter changes the base model's output by much."""
    plain = _output(_base(_base_of(case)))
    return plain.shape != OUTPUTS[case].shape or bool((plain - OUTPUTS[case]).abs().max() > 0.1)


@pytest.mark.parametrize("case", CASES)
def test_what_adapterhub_wrote_computes_what_it_does_there(case: str) -> None:
    assert _moved(case)
    torch.testing.assert_close(_output(_load(case)), OUTPUTS[case], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_it_survives_being_written_and_read_again(case: str, tmp_path: Path) -> None:
    model = _load(case)
    wanted = _output(model)
    model.save_pretrained(tmp_path / case, format="adapterhub")
    torch.testing.assert_close(_output(_load(case, tmp_path)), wanted, **CLOSE)
    model.save_pretrained(tmp_path / "ours")
    again = peft_ext.PeftModel.from_pretrained(_base(_base_of(case)), tmp_path / "ours")
    torch.testing.assert_close(_output(again), wanted, **CLOSE)


@pytest.mark.parametrize(
    "case", ["bert-double_seq_bn", "bert-seq_bn", "bert-compacter++", "bert-lora", "gpt2-seq_bn", "gpt2-lora"]
)
def test_the_very_tensors_are_written_that_were_read(case: str, tmp_path: Path) -> None:
    _load(case).save_pretrained(tmp_path, format="adapterhub")
    theirs, ours = adapterhub.read_adapter(DATA / case), adapterhub.read_adapter(tmp_path)
    for theirs_part, ours_part in ((theirs.adapter, ours.adapter), (theirs.head, ours.head)):
        assert theirs_part is not None and ours_part is not None
        named = {key.replace(".default.", ".task."): tensor for key, tensor in ours_part.tensors.items()}
        assert named.keys() == theirs_part.tensors.keys()
        assert all(torch.equal(tensor, named[key]) for key, tensor in theirs_part.tensors.items())
    same = theirs.adapter.config | {"name": "default", "model_name": ours.adapter.config["model_name"]}
    assert ours.adapter.config == same


def test_several_are_loaded_into_one_model() -> None:
    model = _load("bert-seq_bn")
    model.load_adapter(DATA / "bert-seq_bn-learned_scaling", "other")
    model.set_adapter("other")
    torch.testing.assert_close(_output(model), OUTPUTS["bert-seq_bn-learned_scaling"], **CLOSE)
    model.set_adapter("default")
    torch.testing.assert_close(_output(model), OUTPUTS["bert-seq_bn"], **CLOSE)


def test_training_resumes_with_the_mlp_of_a_prefix() -> None:
    model = peft_ext.PeftModel.from_pretrained(_base("bert"), DATA / "bert-prefix_tuning", is_trainable=True)
    torch.testing.assert_close(_output(model), OUTPUTS["bert-prefix_tuning"], **CLOSE)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("hidden.0.weight") for name in names)


def test_trained_adapters_are_fused_from_adapterhubs_folders(tmp_path: Path) -> None:
    folders = [str(DATA / "bert-fusion" / name) for name in ("first", "second")]
    with pytest.warns(UserWarning, match="head"):
        bare = peft_ext.get_peft_model(_base("bert-bare"), peft_ext.AdapterFusionConfig(adapters=folders))
    assert bare.get_nb_trainable_parameters()[0] == 2 * (3 * 16 * 16 + 2 * 16)
    bare.save_pretrained(tmp_path, format="adapterhub")
    assert (tmp_path / "first,second" / "adapter_fusion_config.json").is_file()
    again = peft_ext.PeftModel.from_pretrained(_base("bert-bare"), tmp_path)
    torch.testing.assert_close(_output(again), _output(bare), **CLOSE)


def test_a_model_without_the_head_goes_without_it_and_says_so() -> None:
    with pytest.warns(UserWarning, match="prediction head, of a BertForSequenceClassification, is left out"):
        bare = peft_ext.PeftModel.from_pretrained(_base("bert").bert, DATA / "bert-seq_bn")
    torch.testing.assert_close(_output(bare), _output(_load("bert-seq_bn").get_base_model().bert), **CLOSE)


def test_an_adapter_of_a_bare_model_goes_into_one_with_a_head(tmp_path: Path) -> None:
    whole = _base("bert")
    whole.bert = _base("bert-bare")
    model = peft_ext.PeftModel.from_pretrained(whole, DATA / "bert-bare-seq_bn")
    torch.testing.assert_close(_output(whole.bert), OUTPUTS["bert-bare-seq_bn"], **CLOSE)
    assert model.active_adapter == "default"


# what we make ourselves


def _randomise(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


SEQ_CLS = {"task_type": "SEQ_CLS"}
OURS: dict[str, tuple[str, peft_ext.PeftConfig]] = {
    "houlsby": ("bert", peft_ext.HoulsbyConfig(**SEQ_CLS, bottleneck_dim=3, train_layer_norms=False)),
    "houlsby-dropped": (
        "bert",
        peft_ext.HoulsbyConfig(
            bottleneck_dim=5, train_layer_norms=False, adapter_drop=peft_ext.AdapterDrop("specialised", 1)
        ),
    ),
    "pfeiffer": ("roberta", peft_ext.PfeifferConfig(**SEQ_CLS, reduction_factor=4, layers_to_transform=[0])),
    "pfeiffer-llama": ("llama", peft_ext.PfeifferConfig(bottleneck_dim=7, non_linearity="silu")),
    "compacter": ("bert", peft_ext.CompacterConfig(reduction_factor=4, phm_dim=2, phm_init_range=0.5)),
    "compacter-own-rules": (
        "bert",
        peft_ext.CompacterConfig(reduction_factor=4, phm_dim=2, phm_init_range=0.5, shared_phm_rule=False),
    ),
    "compacter++": ("gpt2", peft_ext.CompacterPlusPlusConfig(reduction_factor=2, phm_dim=4, original_ln_before=True)),
    "compacter++-paper": ("bert", peft_ext.CompacterPlusPlusConfig(reduction_factor=2, phm_dim=4)),
    "lora": ("bert", peft_ext.LoraConfig(**SEQ_CLS, r=3, lora_alpha=5, use_rslora=True)),
    "lora-patterns": (
        "bert",
        peft_ext.LoraConfig(
            r=2,
            target_modules=["query", "key", "intermediate.dense"],
            rank_pattern={"key": 3},
            alpha_pattern={"layer.1.attention.self.query": 5},
        ),
    ),
    "lora-some-layers": ("bert", peft_ext.LoraConfig(r=2, target_modules=["value"], layers_to_transform=[1])),
    "lora-gpt2": ("gpt2", peft_ext.LoraConfig(task_type="CAUSAL_LM", r=3)),
    "lora-distilbert": ("distilbert", peft_ext.LoraConfig(**SEQ_CLS, r=2)),
    "lora-llama": ("llama", peft_ext.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "up_proj"])),
    "prefix": ("bert", peft_ext.PrefixTuningConfig(**SEQ_CLS, num_virtual_tokens=3)),
    "prefix-projected": ("bert", peft_ext.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)),
    "prefix-gated": ("bert", peft_ext.PrefixTuningConfig(num_virtual_tokens=3, gated=True)),
    "prefix-llama": ("llama", peft_ext.PrefixTuningConfig(num_virtual_tokens=3, shift_positions=False)),
    "prompt": ("bert", peft_ext.HiddenPromptConfig(**SEQ_CLS, num_virtual_tokens=3)),
}


def _make(name: str) -> tuple[str, peft_ext.PeftModel]:
    torch.manual_seed(0)
    base, config = OURS[name]
    model = peft_ext.get_peft_model(_base(base), config)
    _randomise(model)
    return base, model


@pytest.mark.parametrize("name", OURS)
def test_ours_survive_adapterhubs_format(name: str, tmp_path: Path) -> None:
    base, model = _make(name)
    model.save_pretrained(tmp_path, format="adapterhub")
    again = peft_ext.PeftModel.from_pretrained(_base(base), tmp_path)
    torch.testing.assert_close(_output(again), _output(model), **CLOSE)
    assert (_output(model) - _output(_base(base))).abs().max() > 0.01 or base == "bert-bare"


# both ways, with the real library at work

live = pytest.mark.skipif(PYTHON is None, reason="PEFT_EXT_ADAPTERHUB_PYTHON names no interpreter that has AdapterHub")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    _peer("write", folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of everything that we write: ours and AdapterHub's."""
    folder = tmp_path_factory.mktemp("ours")
    models = {case: (_base_of(case), _load(case)) for case in CASES}
    models |= {name: _make(name) for name in OURS}
    jobs = {}
    for index, (name, (base, model)) in enumerate(models.items()):
        safe = bool(index % 2)
        model.save_pretrained(folder / name, format="adapterhub", safe_serialization=safe)
        place = {"base": base, "bases": str(DATA), "folder": str(folder / name)}
        jobs[name] = place | {"safetensors": safe, "fusion": "fusion" in name}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    _peer("read", folder)
    ours = {name: _output(model) for name, (_, model) in models.items()}
    return ours, load_file(folder / "outputs.safetensors")


@live
@pytest.mark.parametrize("name", [*CASES, *OURS])
def test_adapterhub_computes_what_we_do(answers: tuple[dict[str, Tensor], dict[str, Tensor]], name: str) -> None:
    ours, theirs = answers
    torch.testing.assert_close(theirs[name], ours[name], **CLOSE)


@live
@pytest.mark.parametrize("case", CASES)
def test_what_it_writes_now_computes_what_it_does_there(written: Path, case: str) -> None:
    wanted = load_file(written / "outputs.safetensors")[case]
    kind = getattr(transformers, CLASSES[_base_of(case)])
    base = kind.from_pretrained(written / "bases" / _base_of(case), attn_implementation="eager")
    torch.testing.assert_close(_output(peft_ext.PeftModel.from_pretrained(base, written / case)), wanted, **CLOSE)


def _peer(command: str, folder: Path) -> None:
    assert PYTHON is not None
    done = subprocess.run([PYTHON, PEER, command, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# what has no counterpart


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft_ext.HoulsbyConfig(), "layer.0.attention.output.LayerNorm"),
        (peft_ext.LoKrConfig(target_modules=["query"]), "LOKR"),
        (peft_ext.LoraConfig(use_dora=True), "use_dora is True"),
        (peft_ext.LoraConfig(bias="all"), "bias is 'all'"),
        (peft_ext.LoraConfig(target_modules=["attention.output.dense"]), "attention.output.dense: AdapterHub has no"),
        (peft_ext.LoraConfig(target_modules=["query", "pooler.dense"]), "not in the layers of a bert model"),
        (peft_ext.LoraConfig(target_modules=["0.attention.self.query", "1.attention.self.key"]), "has no adapter at"),
        (peft_ext.LoraConfig(modules_to_save=["pooler.dense"]), "bert.pooler.dense.weight"),
        (peft_ext.PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING"),
        (peft_ext.PromptEncoderConfig(num_virtual_tokens=2), "P_TUNING"),
        (peft_ext.BitFitConfig(), "BITFIT"),
        (peft_ext.CompacterConfig(reduction_factor=4, phm_dim=2, num_kron_terms=3), "num_kron_terms is 3"),
    ],
)
def test_what_adapterhub_lacks_is_named_and_nothing_written(
    config: peft_ext.PeftConfig, reason: str, tmp_path: Path
) -> None:
    model = peft_ext.get_peft_model(_base("bert"), config)
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "out", format="adapterhub")
    assert not list(tmp_path.iterdir())


def test_a_prefix_with_a_closed_gate_and_one_that_moves_positions_are_named(tmp_path: Path) -> None:
    model = peft_ext.get_peft_model(_base("bert"), peft_ext.PrefixTuningConfig(num_virtual_tokens=2, gated=True))
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if name.endswith("gate"))[0, 1] = -1
    with pytest.raises(ValueError, match="gated"):
        model.save_pretrained(tmp_path, format="adapterhub")
    model = peft_ext.get_peft_model(_base("gpt2"), peft_ext.PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="position 0"):
        model.save_pretrained(tmp_path, format="adapterhub")
    with pytest.raises(ValueError, match="format must be 'peft' or 'adapterhub', got 'hub'"):
        model.save_pretrained(tmp_path, format="hub")


FIELDS = [
    ("bert-seq_bn", {"is_parallel": True}, "is_parallel is True: parallel adapters"),
    ("bert-seq_bn", {"use_gating": True}, "use_gating"),
    ("bert-seq_bn", {"inv_adapter": "nice"}, "invertible adapters"),
    ("bert-seq_bn", {"ln_before": True}, "ln_before"),
    ("bert-seq_bn", {"ln_after": True}, "ln_after"),
    ("bert-seq_bn", {"original_ln_after": False}, "original_ln_after"),
    ("bert-seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
    ("bert-seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity is 'leakyrelu'"),
    ("bert-seq_bn", {"scaling": "much"}, "scaling must be a number"),
    ("bert-seq_bn", {"mh_adapter": True}, "does not agree on layers"),
    ("bert-seq_bn", {"mh_adapter": 3}, "mh_adapter must be true or false"),
    ("bert-seq_bn", {"leave_out": [0]}, "does not agree on layers"),
    ("bert-seq_bn", {"leave_out": "0"}, "leave_out must be a list"),
    ("bert-seq_bn", {"phm_layer": True}, "miss"),
    ("gpt2-seq_bn", {"mh_adapter": True}, "does not agree on layers"),
    ("bert-compacter", {"shared_W_phm": True}, "shared_W_phm"),
    ("bert-compacter", {"factorized_phm_W": False}, "factorized_phm_W"),
    ("bert-compacter", {"factorized_phm_rule": True}, "phm_rule_left"),
    ("bert-lora", {"composition_mode": "scale"}, "composition_mode is 'scale'"),
    ("bert-lora", {"use_gating": True}, "use_gating"),
    ("bert-lora", {"use_dora": True}, "DoRA"),
    ("bert-lora", {"vera_d": 0.1}, "VeRA"),
    ("bert-lora", {"r": 3}, "lora_A has shape"),
    ("bert-lora", {"r": "many"}, "r must be a number"),
    ("bert-lora", {"output_lora": True}, "does not agree on layers"),
    ("bert-prefix_tuning", {"use_gating": True}, "use_gating"),
    ("bert-prefix_tuning", {"leave_out": [1]}, "leave_out"),
    ("bert-prefix_tuning", {"prefix_length": 4}, "wte.weight has shape"),
    ("bert-prefix_tuning", {"flat": True}, "control_trans"),
    ("bert-prompt_tuning", {"combine": "middle"}, "combine is 'middle'"),
    ("bert-prompt_tuning", {"prompt_length": 4}, "prompt_embedding.weight has shape"),
    ("bert-seq_bn", {"scaling": "channel"}, "scaling is 'channel', but the weights have no such tensor"),
    ("bert-seq_bn-learned_scaling", {"scaling": 2.0}, "scaling must be a number"),
    ("bert-compacter-factorized", {"phm_dim": 3}, "phm_dim=3 must divide"),
    ("bert-lora", {"attn_matrices": None}, "attn_matrices must be a list"),
    ("bert-lora", {"r": 4.5}, "r must be an integer"),
    ("bert-lora", {"dropout": "some"}, "lora_dropout must be in"),
    ("bert-prefix_tuning", {"non_linearity": "mish"}, "non_linearity is 'mish'"),
    ("bert-prefix_tuning_flat", {"prefix_length": 5}, "no prefix of length 5"),
    ("bert-seq_bn", {"architecture": ["lora"]}, "architecture is"),
    ("bert-seq_bn", {"architecture": "union"}, "architecture is 'union'"),
    ("bert-seq_bn", {"architecture": "reft"}, "architecture is 'reft'"),
    ("bert-seq_bn", {"architecture": "lora"}, "no loras of 'task'"),
]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    def copy(case: str) -> Path:
        return Path(shutil.copytree(DATA / case, tmp_path / case))

    return copy


def _fails_cleanly(base: Any, folder: Path, reason: str, snapshot: Snapshot, same: Same) -> None:
    before = snapshot(base)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        peft_ext.PeftModel.from_pretrained(base, folder)
    assert same(base, before)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("case", "fields", "reason"), FIELDS)
def test_configurations_that_we_lack_or_that_are_wrong(
    case: str, fields: dict[str, Any], reason: str, copied: Callable[[str], Path], snapshot: Snapshot, same: Same
) -> None:
    folder = copied(case)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"config": config["config"] | fields}))
    _fails_cleanly(_base(_base_of(case)), folder, reason, snapshot, same)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": "adapters.2.0.0"}, "version is 'adapters.2.0.0', which is not supported"),
        ({"version": "3.2.1"}, "version is '3.2.1'"),
        ({"version": None}, "version is None"),
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"model_type": ["bert"]}, "model_type is"),
        ({"name": 3}, "name must be a string"),
        ({"name": "other"}, "no adapters of 'other'"),
        ({"config": "seq_bn"}, "config must be an object"),
        ({"model_type": "gpt2"}, "no adapters of 'task' in a gpt2"),
    ],
)
def test_files_of_an_unknown_kind(
    fields: dict[str, Any], reason: str, copied: Callable[[str], Path], snapshot: Snapshot, same: Same
) -> None:
    folder = copied("bert-seq_bn")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    _fails_cleanly(_base("bert"), folder, reason, snapshot, same)


@pytest.mark.parametrize("case", ["bert-seq_bn", "bert-lora"])
def test_truncated_files(case: str, copied: Callable[[str], Path], snapshot: Snapshot, same: Same) -> None:
    folder = copied(case)
    base = _base("bert")
    for path in [path for path in folder.iterdir() if path.name.startswith(("pytorch_adapter", "adapter"))]:
        whole = path.read_bytes()
        for tenth in range(10):
            path.write_bytes(whole[: len(whole) * tenth // 10])
            _fails_cleanly(base, folder, "damaged|not valid JSON", snapshot, same)
        path.write_bytes(whole)
    assert peft_ext.PeftModel.from_pretrained(base, folder)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code has run')",))


def test_weights_with_code_in_both_formats_or_in_none(
    copied: Callable[[str], Path], snapshot: Snapshot, same: Same
) -> None:
    folder, base = copied("bert-seq_bn"), _base("bert")
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    save_file(weights, folder / "adapter.safetensors")
    _fails_cleanly(base, folder, "has both adapter.safetensors and pytorch_adapter.bin", snapshot, same)
    (folder / "adapter.safetensors").unlink()
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": _Code()}))
    _fails_cleanly(base, folder, "holds more than tensors", snapshot, same)
    (folder / "pytorch_adapter.bin").unlink()
    _fails_cleanly(base, folder, "no adapter.safetensors or pytorch_adapter.bin", snapshot, same)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.0.output.adapters.task.adapter_up.bias"),
            "miss adapter_up.bias in layer 0",
        ),
        (lambda t: t.update({"bert.encoder.layer.0.output.adapters.task.gate.weight": torch.ones(1)}), "gate.weight"),
        (lambda t: t.update({"bert.invertible_adapters.task.F.0.weight": torch.ones(1)}), "invertible_adapters"),
        (
            lambda t: t.update({"bert.encoder.layer.1.output.adapters.task.adapter_up.weight": torch.ones(3, 4)}),
            "has shape",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.1.output.adapters.task.adapter_down.0.bias": torch.ones(7)}),
            "has shape",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.1.output.adapters.task.adapter_up.weight": torch.ones(16, 7)}),
            "several widths",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.1.output.adapters.task.adapter_up.weight": torch.ones(16)}),
            "shapes of the weights do not fit",
        ),
        (lambda t: [t.pop(key) for key in list(t) if ".layer.0." in key], "does not agree on layers"),
        (lambda t: t.clear(), "no adapters of 'task'"),
    ],
)
def test_wrong_tensors(
    change: Callable[[dict[str, Tensor]], None],
    reason: str,
    copied: Callable[[str], Path],
    snapshot: Snapshot,
    same: Same,
) -> None:
    folder = copied("bert-seq_bn")
    path = folder / "pytorch_adapter.bin"
    tensors = dict(torch.load(path, weights_only=True))
    change(tensors)
    torch.save(tensors, path)
    _fails_cleanly(_base("bert"), folder, reason, snapshot, same)


def test_a_file_without_the_last_layer_is_told_from_one_that_leaves_it_out(
    copied: Callable[[str], Path], snapshot: Snapshot, same: Same
) -> None:
    folder = copied("bert-lora")
    weights, path = folder / "adapter.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if ".layer.1." not in key}, weights)
    _fails_cleanly(_base("bert"), folder, "does not agree on layers", snapshot, same)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"config": config["config"] | {"leave_out": [1, 7]}}))
    assert peft_ext.PeftModel.from_pretrained(_base("bert"), folder)


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        ("adapter_setup.json", {"adapter_setup": {"type": "Stack", "children": []}}, "only a Fuse"),
        ("adapter_setup.json", {"adapter_setup": None}, "only a Fuse"),
        ("first,second/adapter_fusion_config.json", {"adapter_names": ["../../first"]}, "no adapter's name"),
        ("first,second/adapter_fusion_config.json", {"adapter_names": ["third"]}, "no adapter_config.json"),
        ("first,second/adapter_fusion_config.json", {"name": "a,b"}, "no adapter_fusion_layer"),
        ("first,second/adapter_fusion_config.json", {"config": {"temperature": True}}, "temperature is True"),
        ("first,second/adapter_fusion_config.json", {"config": {"query_before_ln": True}}, "query_before_ln"),
    ],
)
def test_fusions_that_we_lack_or_that_are_wrong(
    file: str,
    fields: dict[str, Any],
    reason: str,
    copied: Callable[[str], Path],
    snapshot: Snapshot,
    same: Same,
) -> None:
    folder = copied("bert-fusion")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    _fails_cleanly(_base("bert"), folder, reason, snapshot, same)


def test_loras_of_old_versions_have_a_scale_of_one(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-lora")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "adapters.1.0.1"}))
    report = Report()
    config, _ = from_adapterhub(adapterhub.read(folder), report)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert any("alpha 16 becomes 4" in note for note in report.notes)


def test_a_failed_write_leaves_what_was_there(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("bert-seq_bn")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = _load("bert-seq_bn")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder, format="adapterhub")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_conversion_reads_the_base_model_off_the_keys(tmp_path: Path) -> None:
    from peft_ext.serialization.atomic import write_together

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("houlsby", "lora", "lora-distilbert", "pfeiffer-llama", "lora-gpt2", "lora-llama"):
            base, model = _make(name)
            if name in ("lora", "lora-gpt2", "lora-llama"):  # the targets' names say that they are in all layers
                model.peft_config["default"].base_model_name_or_path = None
            model.save_pretrained(tmp_path / name)
            report = Report()
            write_together(convert(tmp_path / name, tmp_path / f"{name}-hub", "adapterhub", report=report))
            assert any("and of mistral" in note for note in report.notes) == (name == "lora-llama")
            again = peft_ext.PeftModel.from_pretrained(_base(base), tmp_path / f"{name}-hub")
            torch.testing.assert_close(_output(again), _output(model), **CLOSE)
