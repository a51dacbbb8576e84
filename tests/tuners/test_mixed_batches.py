"""One batch, a different adapter for each row or token: every row as the model gives it with its adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_ext import (
    AdapterFusionConfig,
    BitFitConfig,
    CompacterConfig,
    HoulsbyConfig,
    LoKrConfig,
    LoraConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft_ext.tuners.mixed import MixedCheckpoint, run_with

Make = Callable[[str], nn.Module]
NAMES = ["a", "b", "__base__", "b", "a"]
LENGTH = 6

METHODS: dict[str, tuple[Any, Any]] = {
    "lora": (
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        LoraConfig(r=4, lora_alpha=3, target_modules=r".*\.0\..*(query|c_attn|q_proj)", init_lora_weights=False),
    ),
    "dora": (
        LoraConfig(r=2, target_modules=["query", "c_attn", "q_proj"], init_lora_weights=False, use_dora=True),
        LoraConfig(r=4, target_modules=["query", "c_attn", "q_proj"], init_lora_weights=False),
    ),
    "embedding": (
        LoraConfig(r=2, target_modules=["word_embeddings", "wpe", "embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["word_embeddings", "wpe", "embed_tokens"], init_lora_weights=False),
    ),
    "lokr": (
        LoKrConfig(r=2, target_modules=["query", "q_proj", "v_proj"], init_weights=False),
        LoKrConfig(r=4, target_modules=["query", "v_proj", "value"], decompose_both=True, init_weights=False),
    ),
    "houlsby": (
        HoulsbyConfig(bottleneck_dim=4, init_std=0.3),
        HoulsbyConfig(bottleneck_dim=6, init_std=0.3, train_layer_norms=False),
    ),
    "pfeiffer": (PfeifferConfig(bottleneck_dim=4), PfeifferConfig(bottleneck_dim=6)),
    "compacter": (
        CompacterConfig(bottleneck_dim=4, phm_init_range=1.0),
        CompacterConfig(bottleneck_dim=8, phm_init_range=1.0),
    ),
    "prompt": (PromptTuningConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=5)),
    "ptuning": (
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
        PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="LSTM", encoder_hidden_size=8),
    ),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=5, gated=True)),
}
CASES = [
    (method, kind) for method in METHODS for kind in ("bert", "gpt2", "llama") if (method, kind) != ("lokr", "gpt2")
]


@pytest.fixture
def mixed(tiny: Make) -> Callable[..., Any]:
    """A model with two adapters, "a" and "b", of one method, in float64."""

    def make(method: str, kind: str) -> Any:
        first, second = METHODS[method]
        model = get_peft_model(tiny(kind).double(), first, "a")
        model.add_adapter("b", second)
        return model.eval()

    return make


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Five rows, two of which have padding on the left."""
    ids = torch.randint(1, 50, (len(NAMES), LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[4, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def alone(model: Any, name: str, call: Callable[..., Any], row: int, given: dict[str, Tensor]) -> Any:
    """One row, with its adapter as the active one."""
    given = {key: value[row : row + 1] for key, value in given.items()}
    if name == "__base__":
        with model.disable_adapter():
            return call(**given)
    model.set_adapter(name)
    return call(**given)


def text_of(logits: Tensor, mask: Tensor) -> Tensor:
    """Of a row's logits those of the text, without padding, or those of the row."""
    return logits[-LENGTH:][mask.bool()] if logits.dim() == 2 else logits


def train_all(model: Any) -> None:
    model.set_requires_grad(["a", "b"], True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad.any()}


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_rows_and_gradients_are_those_of_each_adapter_alone(
    mixed: Callable[..., Any], inputs: dict[str, Tensor], method: str, kind: str
) -> None:
    model = mixed(method, kind)
    mask = inputs["attention_mask"]
    wanted, total = [], torch.zeros((), dtype=torch.float64)
    for row, name in enumerate(NAMES):
        logits = text_of(alone(model, name, model, row, inputs).logits[0], mask[row])
        wanted.append(logits.detach())
        if logits.requires_grad:
            logits.square().sum().backward()
    expected = gradients(model)
    train_all(model)
    output = model(**inputs, adapter_names=NAMES).logits
    for row in range(len(NAMES)):
        found = text_of(output[row], mask[row])
        torch.testing.assert_close(found, wanted[row])
        total = total + found.square().sum()
    total.backward()
    torch.testing.assert_close(gradients(model), expected)
    torch.testing.assert_close(model(**inputs, adapter_names=model.adapter_indices(NAMES)).logits, output)


@pytest.mark.parametrize("method", ["lora", "houlsby", "prompt", "prefix"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_gives_each_row_what_its_adapter_alone_gives(
    mixed: Callable[..., Any], inputs: dict[str, Tensor], method: str, options: dict[str, Any]
) -> None:
    model = mixed(method, "llama")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    found = model.generate(**given, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        wanted = alone(model, name, lambda **kw: model.generate(**kw, **settings), row, given)
        assert torch.equal(found[row], wanted[0])


def test_each_call_reads_the_parameters_anew(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Within one call of inference they are looked up once: whatever is exchanged before the next one must show."""
    model = mixed("lora", "llama")
    with torch.no_grad():
        before = model(**inputs, adapter_names=NAMES).logits
        for name, parameter in list(model.named_parameters()):
            if ".a." in name:
                owner = model.get_submodule(name.rpartition(".")[0])
                owner.weight = nn.Parameter(parameter + 1, requires_grad=False)
        found = model(**inputs, adapter_names=NAMES).logits
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, model(**inputs, adapter_names=NAMES).logits)


def test_several_sequences_to_a_row(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("lora", "gpt2")
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "num_beams": 2, "num_return_sequences": 2}
    found = model.generate(inputs["input_ids"][:2], adapter_names=["a", "b"], **settings)
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        wanted = model.generate(inputs["input_ids"][row : row + 1], **settings)
        assert torch.equal(found[2 * row : 2 * row + 2], wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "embedding", "lokr", "pfeiffer"])
def test_an_adapter_for_each_token(mixed: Callable[..., Any], method: str) -> None:
    """The layers of one block alone, so that no token sees another."""
    model = mixed(method, "llama")
    names = [["a", "b", "__base__"], ["b", "b", "a"]]
    layer = dict(model.base_model.slots())
    name, slot = next((n, s) for n, s in layer.items() if "a" in s and "b" in s and "layers.1." not in n)
    ids = method == "embedding"
    x = torch.randint(50, (2, 3)) if ids else torch.randn(2, 3, 16, dtype=torch.float64)
    found = run_with(model.base_model.mix(names, (x,), {}), slot_output, slot, x)
    for row in range(2):
        for column in range(3):
            piece = x[row : row + 1, column : column + 1]
            wanted = alone(model, names[row][column], partial(slot_output, slot, piece), 0, {})
            torch.testing.assert_close(found[row, column], wanted[0, 0], msg=f"{name} {row} {column}")


def slot_output(slot: Any, x: Tensor) -> Tensor:
    """What a slot makes of its input; of a whole layer's slot, what it makes of the layer's output."""
    return slot.adapt(x) if hasattr(slot, "adapt") else slot(x)


def test_convolutions(tiny: Make) -> None:
    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)

    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double(), config(2), "a")
    model.add_adapter("b", config(3))
    x = torch.randn(len(NAMES), 3, 5, 5, dtype=torch.float64)
    output = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(output[row], alone(model, name, lambda row=row: model(x[row : row + 1]), 0, {})[0])
    with pytest.raises(ValueError, match="not for each token"):
        model(x, adapter_names=[["a"] * 3] * len(NAMES))


def test_heads_mix(tiny: Make, inputs: dict[str, Tensor]) -> None:
    def config(modules: list[str]) -> LoraConfig:
        return LoraConfig(target_modules=["query"], modules_to_save=modules, init_lora_weights=False)

    model = get_peft_model(tiny("bert").double(), config(["classifier", "pooler"]), "a")
    model.add_adapter("b", config(["classifier"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.eval()
    output = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(output[row], alone(model, name, model, row, inputs).logits[0])
    with pytest.raises(ValueError, match="not for each token"):
        model(**inputs, adapter_names=[["a"] * LENGTH] * len(NAMES))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_outputs_are_hugging_face_pefts(tiny: Make, inputs: dict[str, Tensor], kind: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"]}[kind]
    settings = [{"r": 2, "target_modules": targets}, {"r": 4, "lora_alpha": 3, "target_modules": targets[:1]}]
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(**settings[0]), "a")
    theirs.add_adapter("b", peft.LoraConfig(**settings[1]))
    ours = get_peft_model(tiny(kind), LoraConfig(**settings[0]), "a")
    ours.add_adapter("b", LoraConfig(**settings[1]))
    values = {name: torch.randn_like(value) for name, value in theirs.state_dict().items() if "lora_" in name}
    for model in (theirs, ours):
        assert not model.load_state_dict(values, strict=False).unexpected_keys
    expected = theirs.eval()(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(ours.eval()(**inputs, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby"])
def test_gradient_checkpointing_computes_layers_again_with_the_same_mix(
    mixed: Callable[..., Any], inputs: dict[str, Tensor], method: str, reentrant: bool
) -> None:
    model = mixed(method, "llama").train()
    train_all(model)
    other = ["b"] * len(NAMES)

    def two_steps() -> dict[str, Tensor]:
        # both forwards before both backwards: each has to find its own mix again
        losses = [model(**inputs, adapter_names=names).logits.square().sum() for names in (NAMES, other)]
        for loss in losses:
            loss.backward()
        return gradients(model)

    expected = two_steps()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.enable_input_require_grads()
    found = two_steps()
    torch.testing.assert_close(found, expected)
    plain = [getattr(module, "_gradient_checkpointing_func", None) for module in model.unload().modules()]
    assert any(plain)
    assert not any(isinstance(function, MixedCheckpoint) for function in plain)


def test_dropout_trains(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("lora", "llama")
    model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    train_all(model)
    first, second = (model(**inputs, adapter_names=NAMES).logits for _ in range(2))
    changed = (first != second).flatten(1).any(1)
    assert changed.tolist() == [name == "b" for name in NAMES]


def test_another_mix_compiles_nothing_anew(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("lora", "llama")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    mixes = [NAMES, ["a"] * 5, ["__base__", "b", "b", "b", "a"]]
    frames = set()
    for names in mixes:
        index = model.adapter_indices(names)
        expected = model(**inputs, adapter_names=names).logits
        torch.testing.assert_close(compiled(**inputs, adapter_names=index).logits, expected)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_names_compile_too(tiny: Make) -> None:
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(tiny("mlp"), config, "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["2", "4"], init_lora_weights=False))
    x = torch.randn(5, 8)
    expected = model(x, adapter_names=NAMES)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, adapter_names=NAMES), expected)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(x, adapter_names=model.adapter_indices(NAMES)), expected)


@pytest.mark.parametrize("method", ["houlsby", "prompt", "prefix"])
def test_other_methods_compile(mixed: Callable[..., Any], inputs: dict[str, Tensor], method: str) -> None:
    model = mixed(method, "llama")
    if method == "prefix":  # gates make the number of tokens depend on values
        model.delete_adapter("b")
        model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
        model.eval()
    index = model.adapter_indices(NAMES)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(**inputs, adapter_names=index).logits
    torch.testing.assert_close(compiled(**inputs, adapter_names=index).logits, expected)


def test_indices_stay_with_their_adapters(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("lora", "gpt2")
    index = model.adapter_indices(["b"] * 5)
    expected = model(**inputs, adapter_names=index).logits
    model.delete_adapter("a")
    torch.testing.assert_close(model(**inputs, adapter_names=index).logits, expected)
    with pytest.raises(ValueError, match="no adapter has"):
        model(**inputs, adapter_names=torch.zeros_like(index))
    model.add_adapter("c", METHODS["lora"][0])
    assert model.adapter_indices(["c", "__base__", "b"]).tolist() == [0, -1, 1]


BAD: list[tuple[Any, type[Exception], str]] = [
    (["a"] * 4, ValueError, r"one name for each row of the batch: got \[4\] for an input of \[5, 6\]"),
    ([["a"] * 5] * 5, ValueError, r"one name for each token of the batch: got \[5, 5\]"),
    (["a"] * 4 + ["x"], ValueError, r"\['x'\], but the model has \['a', 'b'\]"),
    ("abbaa", TypeError, "must be a list of names"),
    (["a"] * 4 + [1], TypeError, "must hold names, got 1"),
    ([["a"]] * 4 + [["a", "b"]], ValueError, "lists of one length"),
    (torch.zeros(5), TypeError, "int64"),
    (torch.full((5,), 7), ValueError, r"\[7\], which no adapter has"),
    (torch.zeros(5, 1, 1, dtype=torch.int64), ValueError, r"must be \[batch\] or \[batch, length\]"),
]


@pytest.mark.parametrize(("names", "error", "message"), BAD)
def test_bad_names(
    mixed: Callable[..., Any], inputs: dict[str, Tensor], names: Any, error: type[Exception], message: str
) -> None:
    model = mixed("lora", "gpt2")
    with pytest.raises(error, match=message):
        model(**inputs, adapter_names=names)
    with pytest.raises(error, match=message):
        model.generate(**inputs, adapter_names=names)


def test_merged_adapters_do_not_mix(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("lora", "gpt2")
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged: unmerge"):
        model(**inputs, adapter_names=NAMES)


def test_prompts_do_not_mix_by_token(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    names = [["a"] * LENGTH] * len(NAMES)
    for method in ("prompt", "prefix"):
        with pytest.raises(ValueError, match="one adapter for each row, not for each token"):
            mixed(method, "gpt2")(**inputs, adapter_names=names)


def test_methods_that_cannot_mix_say_so(tiny: Make, inputs: dict[str, Tensor]) -> None:
    model = get_peft_model(tiny("bert"), BitFitConfig(), "a")
    with pytest.raises(ValueError, match="the rows of a batch cannot have different adapters in a BitFitModel"):
        model(**inputs, adapter_names=["a"] * 5)


def test_labels_before_prompts_of_different_lengths(mixed: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    model = mixed("prompt", "gpt2")
    ids = inputs["input_ids"]
    losses, counts = [], []
    for row, name in enumerate(NAMES):
        given = {"input_ids": ids, "labels": ids}
        losses.append(alone(model, name, model, row, given).loss)
        counts.append(LENGTH - (name == "__base__"))  # a prompt's last token predicts the text's first
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(input_ids=ids, labels=ids, adapter_names=NAMES).loss, expected)


def test_fusions_mix(tiny: Make, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("first", "second"):
        get_peft_model(tiny("bert"), PfeifferConfig(bottleneck_dim=4)).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("first", "second")]
    model = get_peft_model(tiny("bert").double(), AdapterFusionConfig(adapters=folders, modules_to_save=None), "a")
    model.add_adapter("b", AdapterFusionConfig(adapters=folders[1:]))
    for name, parameter in model.named_parameters():
        if ".fusion." in name:
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    output = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(output[row], alone(model, name, model, row, inputs).logits[0])
    labels = torch.tensor([0, 1, 0, 1, 0])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = model(**inputs, labels=labels, adapter_names=["b"] * 5).loss
    model.set_adapter("b")
    torch.testing.assert_close(loss, model(**inputs, labels=labels).loss)  # with the regularisation of "b"


def test_a_model_within_anothers_call_has_a_mix_of_its_own(tiny: Make) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    inner, outer = (get_peft_model(tiny("mlp"), config, "a").eval() for _ in range(2))
    x = torch.randn(2, 8)
    mix = outer.base_model.mix(["__base__"] * 2, (x,), {})
    torch.testing.assert_close(run_with(mix, inner, x), inner(x))
