from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from peft_ext import (
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

transformers = pytest.importorskip("transformers")

KINDS = ["bert", "gpt2", "llama"]
TOKENS = 3


def prefixed(model: nn.Module, **options) -> PeftModel:
    return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=TOKENS, **options)).eval()


def ids(length: int = 5) -> torch.Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))


def padding(length: int = 5, side: str = "right") -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask if side == "right" else mask.flip(1)


def prefix_of(model: PeftModel) -> torch.Tensor:
    return dict(model.named_parameters())[
        next(name for name, _ in model.named_parameters() if name.endswith("encoder.default.embedding"))
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prefix_trains(tiny, kind, implementation):
    model = tiny(kind)
    model.set_attn_implementation(implementation)
    model = prefixed(model).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 1
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        logits = model(input_ids=ids(), attention_mask=padding()).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), torch.zeros(logits.shape[:-1], dtype=int).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_agree(tiny, kind, masked):
    logits = []
    for implementation in ("eager", "sdpa"):
        model = tiny(kind)
        model.set_attn_implementation(implementation)
        torch.manual_seed(2)
        logits.append(prefixed(model)(input_ids=ids(), attention_mask=padding() if masked else None).logits)
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("projection", [False, True])
def test_interchange_with_hugging_face_peft(tiny, greedy, kind, projection, tmp_path):
    """Both ways, logits and greedy generation; positions are shifted as there."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        tiny(kind),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=projection),
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny(kind), tmp_path / "theirs")
    options = {"input_ids": ids(), "attention_mask": padding(side="left")}
    torch.testing.assert_close(
        ours(input_ids=ids()).logits, theirs(input_ids=ids(), attention_mask=torch.ones(2, 5)).logits
    )
    whole = {"input_ids": ids(), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    made = ours.generate(**whole, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(made, greedy(theirs, ids(), 6))
    assert ours(**options).logits.isfinite().all()

    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(
        again(input_ids=ids(), attention_mask=torch.ones(2, 5)).logits, ours(input_ids=ids()).logits
    )


def test_bert_equals_a_formula(tiny, monkeypatch):
    """Concatenation of the prefix in front of each layer's keys and values; positions as without a prefix."""
    model = prefixed(tiny("bert"), task_type="SEQ_CLS")
    got = model(input_ids=ids(), attention_mask=padding()).logits
    prefix = prefix_of(model).detach().view(TOKENS, 4, 2, 8)
    plain, layer = model.unload(), iter(range(2))
    original = transformers.models.bert.modeling_bert.eager_attention_forward

    def concatenated(module, query, key, value, mask, **kwargs):
        at = next(layer)
        keys, values = (prefix[:, 2 * at + i].transpose(0, 1).expand(2, -1, -1, -1) for i in range(2))
        mask = torch.cat([mask.new_zeros(2, 1, mask.size(2), TOKENS), mask], -1)
        return original(module, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask, **kwargs)

    plain.set_attn_implementation("eager")
    monkeypatch.setattr(transformers.models.bert.modeling_bert, "eager_attention_forward", concatenated)
    torch.testing.assert_close(plain(input_ids=ids(), attention_mask=padding()).logits, got)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_a_cache_equals_without(tiny, kind, implementation, cache):
    model = tiny(kind)
    model.set_attn_implementation(implementation)
    model = prefixed(model)
    options = {"input_ids": ids(), "attention_mask": padding(side="left"), "max_new_tokens": 6, "do_sample": False}
    options["pad_token_id"] = 0
    without = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options, use_cache=True, cache_implementation=cache), without)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**options), without)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tiny, run, kind, projection, tmp_path):
    model = prefixed(tiny(kind), prefix_projection=projection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    torch.testing.assert_close(run(loaded), run(model))
    if not projection:
        assert torch.equal(run(loaded), run(model))
        again = PeftModel.from_pretrained(tiny(kind), tmp_path, is_trainable=True)
        assert prefix_of(again).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_with_the_projection(tiny, run, kind, tmp_path):
    model = prefixed(tiny(kind), prefix_projection=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(kind), tmp_path, is_trainable=True).eval()
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    # as Trainer does it with load_best_model_at_end
    best = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in trained[0].values():
            parameter.add_(1)
    set_peft_model_state_dict(model, best)
    assert torch.equal(run(model), run(again))


def test_training_does_not_resume_without_the_projection(tiny, tmp_path, same, snapshot):
    inference = prefixed(tiny("gpt2"), prefix_projection=True)
    inference.save_pretrained(tmp_path / "first")
    PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "first").save_pretrained(tmp_path / "plain")
    base = tiny("gpt2")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"missing keys: prompt_encoder\.embedding"):
        PeftModel.from_pretrained(base, tmp_path / "plain", is_trainable=True)
    assert same(base, before)


def test_more_tokens_than_learned_positions(tiny):
    model = prefixed(tiny("gpt2"))
    longest = 32 - TOKENS
    assert model(input_ids=torch.zeros(1, longest, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"an input of {longest + 1} are more than the model's 32 learned"):
        model(input_ids=torch.zeros(1, longest + 1, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_switching_disabling_deleting_and_unloading(tiny, run, kind):
    base = tiny(kind)
    plain = run(base)
    modules = [(name, type(module)) for name, module in base.named_modules()]
    config = base.config
    model = prefixed(base)
    first = run(model)
    model.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=2 * TOKENS))
    model.set_adapter("other")
    assert not torch.equal(run(model), first)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    with pytest.raises(ValueError, match="cannot be active together"):
        model.set_adapter(["default", "other"])
    model.delete_adapter("other")
    assert torch.equal(run(model), first)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == modules
    assert all(module.config is config for module in unloaded.modules() if hasattr(module, "layer_idx"))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(tiny, kind, reentrant, projection):
    gradients = []
    for checkpointing in (False, True):
        base = tiny(kind)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model = prefixed(base, prefix_projection=projection)
        for module in model.modules():
            if not isinstance(module, nn.Dropout):
                module.training = True
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=ids(), attention_mask=padding()).logits.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("model_type", ["roberta", "mistral", "qwen2"])
def test_further_architectures(model_type, run):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 32, "pad_token_id": 0}
    if model_type != "roberta":
        sizes["num_key_value_heads"] = 2
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    cls = (
        transformers.AutoModelForSequenceClassification
        if model_type == "roberta"
        else transformers.AutoModelForCausalLM
    )
    base = cls.from_config(config).eval()
    plain = run(base)
    model = prefixed(base)
    assert not torch.equal(run(model), plain)
    run(model).sum().backward()
    assert (prefix_of(model).grad.unflatten(1, (2, -1)) != 0).any(-1).all()


BAD = {
    "layers of another model": ({"num_layers": 12}, "num_layers is 12, but the model's is 2"),
    "heads of another model": ({"num_attention_heads": 12}, "num_attention_heads is 12, but the model's is 2"),
    "width of another model": ({"token_dim": 768}, "token_dim is 768, but the model's is 16"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_configuration(tiny, same, snapshot, options, message):
    base = tiny("bert")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        prefixed(base, **options)
    assert same(base, before)


def test_bad_values():
    for options, message in (
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer > 0"),
        ({}, "num_virtual_tokens must be an integer > 0"),
        ({"num_virtual_tokens": 1, "init_weights": "one"}, "init_weights must be"),
        ({"num_virtual_tokens": 1, "gated": True, "prefix_projection": True}, "gated needs prefix_projection=False"),
        ({"num_virtual_tokens": 1, "num_transformer_submodules": 2}, "num_transformer_submodules must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixTuningConfig(**options)


def test_flags_are_bools():
    with pytest.raises(TypeError, match="prefix_projection must be a bool, got 'x'"):
        PrefixTuningConfig(num_virtual_tokens=1, prefix_projection="x")
    with pytest.raises(TypeError, match="gated must be a bool, got 1"):
        PrefixTuningConfig(num_virtual_tokens=1, gated=1)
    with pytest.raises(TypeError, match="shift_positions must be a bool, got 'no'"):
        PrefixTuningConfig(num_virtual_tokens=1, shift_positions="no")
    assert not {"gated", "shift_positions"} & PrefixTuningConfig(num_virtual_tokens=1).to_dict().keys()


def gate_of(model: PeftModel) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if name.endswith("encoder.default.gate"))


def set_gate(model: PeftModel, values: list[list[float]]) -> None:
    with torch.no_grad():
        gate_of(model).copy_(torch.tensor(values))


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_plain_prefix_tuning(tiny, run, kind):
    torch.manual_seed(2)
    plain = prefixed(tiny(kind))
    torch.manual_seed(2)
    gated = prefixed(tiny(kind), gated=True)
    assert torch.equal(run(gated), run(plain))
    assert gated.get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0] + TOKENS * 2


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_are_the_base_model(tiny, run, kind):
    base = tiny(kind)
    wanted = run(base)
    model = prefixed(base, gated=True)
    assert not torch.allclose(run(model), wanted)
    set_gate(model, [[0.0, -1.0]] * TOKENS)
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_scale_a_token_in_a_layer_or_leave_it_out(tiny, run, kind):
    """By a plain prefix of the open token, whose keys and values are scaled by hand."""
    model = prefixed(tiny(kind), gated=True)
    set_gate(model, [[0.0, 0.0], [0.5, 2.0], [-1.0, -1.0]])
    plain = get_peft_model(tiny(kind), PrefixTuningConfig(num_virtual_tokens=1)).eval()
    with torch.no_grad():
        layers = prefix_of(model)[1].unflatten(0, (2, -1))
        prefix_of(plain).copy_((layers * torch.tensor([[0.5], [2.0]])).flatten().unsqueeze(0))
    torch.testing.assert_close(run(model), run(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_may_be_closed_in_one_layer_only(tiny, run, kind):
    outputs = []
    for gate in ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0]):
        torch.manual_seed(2)
        model = prefixed(tiny(kind), gated=True)
        set_gate(model, [[1.0, 1.0], gate, [1.0, 1.0]])
        outputs.append(run(model))
        outputs[-1].sum().backward()
        assert torch.equal(gate_of(model).grad[1] == 0, torch.tensor(gate) == 0)
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_train_and_are_saved(tiny, run, kind, tmp_path):
    model = prefixed(tiny(kind), gated=True)
    set_gate(model, [[1.0, 0.0], [0.5, 2.0], [-1.0, -1.0]])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    (run(model) - 1).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"embedding", "gate"}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny(kind), tmp_path)), wanted)
    further = PeftModel.from_pretrained(tiny(kind), tmp_path, is_trainable=True)
    assert torch.equal(gate_of(further), gate_of(model))
    assert gate_of(further).requires_grad


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gated_prefix_in_hugging_face_peft(tiny, kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = prefixed(tiny(kind), gated=True, task_type="CAUSAL_LM")
    set_gate(model, [[0.5, 2.0]] * TOKENS)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="gated"):
        theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    ones = torch.ones(2, 5, dtype=torch.long)
    wanted = model(input_ids=ids()).logits
    torch.testing.assert_close(theirs(input_ids=ids(), attention_mask=ones).logits, wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_with_gates(tiny, kind):
    model = prefixed(tiny(kind), gated=True)
    set_gate(model, [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
    options = {"input_ids": ids(), "attention_mask": padding(side="left"), "max_new_tokens": 6, "do_sample": False}
    options["pad_token_id"] = 0
    without = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), without)


@pytest.mark.parametrize("kind", KINDS)
def test_without_shifted_positions_the_text_begins_at_zero(tiny, run, kind, tmp_path):
    """The option moves a decoder's text; an encoder's stays in any case."""
    model = prefixed(tiny(kind), shift_positions=False)
    prompt = prefix_of(model)
    assert not any(type(module).__name__ == "ShiftedPositions" for module in model.modules())
    torch.manual_seed(0)
    moved = prefixed(tiny(kind))
    with torch.no_grad():
        prefix_of(moved).copy_(prompt)
    same_output = torch.equal(run(model), run(moved))
    assert same_output == (kind == "bert")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(PeftModel.from_pretrained(tiny(kind), tmp_path)), run(model))


def test_unknown_architecture(tiny):
    with pytest.raises(ValueError, match="does not know the attention of Sequential"):
        prefixed(tiny("mlp"))


def test_checkpoint_of_another_model(tiny, tmp_path, same, snapshot):
    prefixed(tiny("bert")).save_pretrained(tmp_path)
    base = tiny("gpt2")
    before = snapshot(base)
    with pytest.raises(ValueError, match="prompt_embeddings has shape"):
        PeftModel.from_pretrained(base, tmp_path, config=PrefixTuningConfig(num_virtual_tokens=TOKENS + 1))
    assert same(base, before)


def test_deepcopy(tiny, run):
    model = prefixed(tiny("gpt2"))
    assert torch.equal(run(copy.deepcopy(model)), run(model))
