"""Prompts before the input: prompt tuning and P-tuning v1."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft_ext.tuners.generation import cache_of

transformers = pytest.importorskip("transformers")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]

COUNT = 3
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
METHODS = {
    "prompt": (PromptTuningConfig, {}),
    "mlp": (PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "lstm": (PromptEncoderConfig, {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "gated": (PromptEncoderConfig, {"encoder_hidden_size": 8, "gated": True}),
}


def config_of(method: str, kind: str, **more: Any) -> Any:
    config_class, arguments = METHODS[method]
    return config_class(**{"task_type": TASKS[kind], "num_virtual_tokens": COUNT, **arguments, **more})


def adapted(model: nn.Module, method: str, kind: str, **more: Any) -> PeftModel:
    model = get_peft_model(model, config_of(method, kind, **more)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prompt_of(model: PeftModel) -> Tensor:
    return model.get_input_embeddings().prompt()


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def small_llama_classifier() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return transformers.LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_output_is_the_base_models_on_the_lengthened_input(tiny: Make, method: str, kind: str) -> None:
    base = tiny(kind)
    plain = copy.deepcopy(base)
    model = adapted(base, method, kind)
    ids = tokens()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    prompt = prompt_of(model)
    embeds = torch.cat([prompt.expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    if kind == "bert":
        plain.classifier = model.get_base_model().classifier.active_module
    expected = plain(inputs_embeds=embeds, attention_mask=torch.cat([torch.ones(2, COUNT).long(), mask], 1))
    for inputs in ({"input_ids": ids}, {"inputs_embeds": plain.get_input_embeddings()(ids)}):
        torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, expected.logits)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_prompt_only_and_lowers_the_loss(tiny: Make, method: str, kind: str) -> None:
    model = get_peft_model(tiny(kind), config_of(method, kind))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens(8)
    labels = torch.arange(8) % 2 if kind == "bert" else ids
    losses = []
    model.eval()
    for _ in range(15):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained == {n for n in before if ".prompt_encoder." in n or ".modules_to_save." in n}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(tiny: Make, tmp_path: Path, method: str, kind: str) -> None:
    model = adapted(tiny(kind), method, kind)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    resumed = PeftModel.from_pretrained(tiny(kind), tmp_path, is_trainable=True).eval()
    trained = [{n: p.detach() for n, p in m.named_parameters() if p.requires_grad} for m in (model, resumed)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_what_is_saved_in_training_has_no_dropout(tiny: Make, tmp_path: Path) -> None:
    config = config_of("lstm", "llama", encoder_dropout=0.5, encoder_num_layers=2)
    model = get_peft_model(tiny("llama"), config).train()
    model.save_pretrained(tmp_path)
    assert model.get_input_embeddings().prompt_encoder["default"].training
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_training_does_not_resume_without_the_encoder(tiny: Make, tmp_path: Path, snapshot: Any, same: Any) -> None:
    adapted(tiny("llama"), "mlp", "llama").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    base = tiny("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"missing keys: prompt_encoder\.embedding\.weight"):
        PeftModel.from_pretrained(base, tmp_path / "again", is_trainable=True)
    assert same(base, before)
    assert not base._forward_pre_hooks


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generates_what_stepping_by_hand_gives(tiny: Make, kind: str, arguments: dict[str, Any]) -> None:
    model = adapted(tiny(kind), "prompt", kind)
    ids = tokens()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        **arguments,
    )
    assert made.shape == (2, 9)
    if "num_beams" in arguments:
        return
    by_hand = ids
    for _ in range(4):
        logits = model(by_hand).logits[:, -1]
        if kind == "gpt2":
            logits[:, 0] = -torch.inf  # min_new_tokens forbids the end
        else:
            logits[:, model.config.eos_token_id] = -torch.inf
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, by_hand)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_prompt_goes_into_the_cache_once(tiny: Make, kind: str) -> None:
    model = adapted(tiny(kind), "prompt", kind)
    ids = tokens()
    whole = model(ids).logits
    first = model(input_ids=ids[:, :3], use_cache=True)
    cache = cache_of(first)
    assert cache.get_seq_length() == COUNT + 3
    second = model(
        input_ids=ids[:, 3:],
        **{"cache" if "cache" in first else "past_key_values": cache},
        attention_mask=torch.ones_like(ids),
        position_ids=torch.tensor([[3, 4]]),
    )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "return_dict_in_generate": True}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert cache_of(made).get_seq_length() == COUNT + 5 + 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_the_left_does_not_change_what_is_generated(tiny: Make, kind: str) -> None:
    model = adapted(tiny(kind), "prompt", kind)
    ids = tokens(1)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    mask = (torch.arange(7) >= 2).long().unsqueeze(0)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 2:], alone)


def test_a_decoder_classifies_a_padded_row_as_the_row_alone() -> None:
    model = adapted(small_llama_classifier(), "prompt", "bert")
    ids = tokens(1)
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 5).long().unsqueeze(0)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, model(ids).logits)


def test_positions_given_are_positions_counted(tiny: Make) -> None:
    for kind in TASKS:
        model = adapted(tiny(kind), "prompt", kind)
        given = model(input_ids=tokens(), position_ids=torch.arange(5).unsqueeze(0)).logits
        torch.testing.assert_close(given, model(tokens()).logits)


def test_token_types_are_lengthened(tiny: Make) -> None:
    model = adapted(tiny("bert"), "prompt", "bert")
    types = torch.tensor([[0, 0, 0, 1, 1]]).expand(2, 5)
    seen = {}
    model.get_base_model().bert.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(input_ids=tokens(), token_type_ids=types)
    assert torch.equal(seen["token_type_ids"], torch.cat([torch.zeros(2, COUNT).long(), types], 1))


def test_token_labels_ignore_the_prompt(tiny: Make) -> None:
    model = adapted(tiny("gpt2"), "prompt", "gpt2")
    output = model(input_ids=tokens(), labels=tokens())
    logits = output.logits[:, COUNT - 1 : -1].flatten(0, 1)  # the last virtual token predicts the first word
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, tokens().flatten()))


def test_token_classification(tiny: Make) -> None:
    base = transformers.BertForTokenClassification(tiny("bert").config).eval()
    model = get_peft_model(base, PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=COUNT)).eval()
    labels = tokens() % 2
    output = model(input_ids=tokens(), labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, COUNT:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_question_answering_counts_from_the_first_output(tiny: Make) -> None:
    base = transformers.BertForQuestionAnswering(tiny("bert").config).eval()
    model = get_peft_model(base, PromptTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=COUNT)).eval()
    start, end = torch.tensor([0, 1]), torch.tensor([2, 4])
    output = model(tokens(), start_positions=start, end_positions=end)
    losses = [
        nn.functional.cross_entropy(logits, at + COUNT)
        for logits, at in ((output.start_logits, start), (output.end_logits, end))
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", TASKS)
def test_gradient_checkpointing(tiny: Make, kind: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        base = tiny(kind)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(base, config_of("prompt", kind)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.nn.init.normal_(prompt_of(model), generator=torch.Generator().manual_seed(5))
        model(input_ids=tokens()).logits.square().sum().backward()
        grads.append(prompt_of(model).grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", TASKS)
def test_closed_gates_are_the_base_model(tiny: Make, tmp_path: Path, kind: str) -> None:
    base = tiny(kind)
    expected = base(tokens()).logits
    model = get_peft_model(base, config_of("gated", kind)).eval()
    gate = model.get_input_embeddings().prompt_encoder["default"].gate
    assert not torch.equal(model(tokens()).logits, expected)
    with torch.no_grad():
        gate[:2] = -1.0
    assert model(tokens()).logits.shape == (
        expected.shape if kind == "bert" else torch.Size([2, 6, 50])
    )  # one token of three is left
    one_left = model(tokens()).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(tiny(kind), tmp_path)(tokens()).logits, one_left)
    with torch.no_grad():
        gate.zero_()
    assert torch.equal(model(tokens()).logits, expected)


def test_several_prompts(tiny: Make, run: Run, tmp_path: Path) -> None:
    base = tiny("llama")
    plain = run(base)
    model = adapted(base, "prompt", "llama")
    first = run(model)
    model.add_adapter("long", config_of("prompt", "llama", num_virtual_tokens=4))
    assert torch.equal(run(model), first)
    model.set_adapter("long")
    second = run(model)
    assert second.shape[1] == first.shape[1] + 1
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["base_model.model.model.embed_tokens.prompt_encoder.long.embedding.weight"]
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    with pytest.raises(ValueError, match="only one prompt can be active"):
        model.set_adapter(["default", "long"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "long", "long")
    loaded.set_adapter("long")
    torch.testing.assert_close(run(loaded), second)
    model.delete_adapter("long")
    assert torch.equal(run(model), first)
    model.delete_adapter("default")
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("kind", TASKS)
def test_unloading_gives_the_base_model_back(tiny: Make, run: Run, snapshot: Any, same: Any, kind: str) -> None:
    base = tiny(kind)
    expected = run(base)
    modules = [(name, type(module)) for name, module in base.named_modules()]
    model = adapted(base, "mlp", kind)
    with pytest.raises(ValueError, match="no weight that it could be merged into"):
        model.merge_and_unload()
    plain = model.unload()
    assert plain is base
    assert [(name, type(module)) for name, module in plain.named_modules()] == modules
    assert not plain._forward_pre_hooks
    assert torch.equal(run(plain), expected)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles(tiny: Make, run: Run, method: str) -> None:
    model = adapted(tiny("llama"), method, "llama")
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), expected)
        with torch.no_grad():
            other.get_input_embeddings().prompt_encoder["default"].embedding.weight.add_(1)
        assert not torch.equal(run(other), expected)
        assert not other.unload()._forward_pre_hooks
    assert torch.equal(run(model), expected)


def test_half_precision_base(tiny: Make, run: Run) -> None:
    model = get_peft_model(tiny("llama").to(torch.bfloat16), config_of("prompt", "llama"))
    assert prompt_of(model).dtype == torch.float32
    assert run(model).dtype == torch.bfloat16
    model = get_peft_model(tiny("llama").to(torch.bfloat16), config_of("prompt", "llama"), autocast_adapter_dtype=False)
    assert prompt_of(model).dtype == torch.bfloat16


def test_starts_from_tokens_of_the_vocabulary(tiny: Make) -> None:
    model = get_peft_model(tiny("gpt2"), config_of("prompt", "gpt2", prompt_tuning_init="SAMPLE_VOCAB"))
    weight = model.get_input_embeddings().weight
    assert all((weight == row).all(1).any() for row in prompt_of(model))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 7, "or": 8, "bad": 9, "far": 90}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize(("count", "ids"), [(2, [7, 8]), (3, [7, 8, 9]), (5, [7, 8, 9, 7, 8])])
def test_starts_from_a_text(tiny: Make, tokenizer: str, tmp_path: Path, count: int, ids: list[int]) -> None:
    start = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "good or bad",
        "tokenizer_name_or_path": tokenizer,
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    model = get_peft_model(tiny("gpt2"), config_of("prompt", "gpt2", num_virtual_tokens=count, **start))
    assert torch.equal(prompt_of(model), model.get_input_embeddings().weight[ids])
    model.save_pretrained(tmp_path / "adapter")
    Path(tokenizer, "tokenizer.json").unlink()  # a checkpoint can do without
    resumed = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(prompt_of(resumed), prompt_of(model))


def test_a_text_of_another_vocabulary(tiny: Make, tokenizer: str, snapshot: Any, same: Any) -> None:
    base = tiny("gpt2")
    before = snapshot(base)
    config = PromptTuningConfig(
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="far",
        tokenizer_name_or_path=tokenizer,
    )
    with pytest.raises(ValueError, match="gives token 90, but the model's vocabulary has 50"):
        get_peft_model(base, config)
    assert same(base, before)


@pytest.mark.parametrize(
    ("config_class", "arguments", "error", "match"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": None}, ValueError, "num_virtual_tokens must be an integer > 0"),
        (PromptTuningConfig, {"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be an integer > 0, got 0"),
        (PromptTuningConfig, {"token_dim": 1.5}, ValueError, "token_dim must be an integer > 0, got 1.5"),
        (PromptTuningConfig, {"num_transformer_submodules": 2}, ValueError, "must be 1, got 2"),
        (PromptTuningConfig, {"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of str"),
        (PromptTuningConfig, {"prompt_tuning_init": "ZEROS"}, ValueError, "prompt_tuning_init is 'ZEROS'"),
        (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, ValueError, "needs prompt_tuning_init_text, got None"),
        (PromptTuningConfig, {"tokenizer_kwargs": {"a": 1}}, ValueError, "needs prompt_tuning_init='TEXT'"),
        (PromptEncoderConfig, {"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size must be an integer > 0"),
        (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, ValueError, "must be one of 'MLP', 'LSTM'"),
        (PromptEncoderConfig, {"encoder_dropout": 2}, ValueError, r"encoder_dropout must be in \[0, 1\], got 2"),
        (PromptEncoderConfig, {"gated": 1}, TypeError, "gated must be a bool, got 1"),
    ],
)
def test_values_out_of_range(config_class: Any, arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        config_class(**{"num_virtual_tokens": 2, **arguments})


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        ("mlp", {}, r"needs a model with forward\(input_ids=...\) .* Sequential is none"),
        ("llama", {"token_dim": 8}, "token_dim is 8, but the model's embeddings have 16 features"),
        ("gpt2", {"num_virtual_tokens": 32}, "num_virtual_tokens is 32, but the model takes 32 tokens at most"),
    ],
)
def test_models_that_do_not_suit(
    tiny: Make, snapshot: Any, same: Any, kind: str, arguments: dict[str, Any], match: str
) -> None:
    base = tiny(kind)
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, PromptTuningConfig(**{"num_virtual_tokens": 2, **arguments}))
    assert same(base, before)
    assert not base._forward_pre_hooks


def test_encoders_with_a_decoder_are_refused() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    base = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="does not support models with an encoder and a decoder"):
        get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize(("method", "kind"), [*(("prompt", kind) for kind in TASKS), ("mlp", "gpt2")])
def test_compiled(tiny: Make, method: str, kind: str) -> None:
    model = adapted(tiny(kind), method, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 7):
        ids = tokens(2, length)
        with torch.compiler.set_stance("default" if length == 5 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", TASKS)
def test_autocast_computes_the_base_in_bfloat16_and_trains_a_float32_prompt(tiny: Make, kind: str) -> None:
    model = adapted(tiny(kind), "mlp", kind)
    wanted = model(input_ids=tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens()).logits
    logits.float().square().mean().backward()
    torch.testing.assert_close(logits.float(), wanted, rtol=0.1, atol=0.1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_more_tokens_than_learned_positions(tiny: Make, kind: str) -> None:
    if kind == "roberta":
        config = transformers.RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=34,
            pad_token_id=1,
        )
        base = transformers.RobertaForSequenceClassification(config).eval()
    else:
        base = tiny(kind)
    longest = 512 if kind == "bert" else 32
    model = get_peft_model(base, config_of("prompt", "bert" if kind == "roberta" else kind)).eval()
    ids = torch.full((1, longest - COUNT), 4)
    assert model(input_ids=ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"an input of {ids.size(1) + 1} are more than the model's {longest} "):
        model(input_ids=torch.full((1, longest - COUNT + 1), 4))


def test_a_failed_call_leaves_nothing_behind(tiny: Make) -> None:
    model = adapted(tiny("llama"), "mlp", "llama")
    hook = model.get_base_model().model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=tokens())
    hook.remove()
    embeddings = model.get_input_embeddings()
    assert torch.equal(embeddings(tokens()), embeddings.base_layer(tokens()))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_inputs_that_do_not_suit(tiny: Make) -> None:
    model = adapted(tiny("llama"), "prompt", "llama")
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\], got \(2, 1, 5, 5\)"):
        model(input_ids=tokens(), attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="a prompt needs input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(2, 5))


def test_the_trainer(tiny: Make, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from peft_ext.tuners.trainer import Trainer

    model = get_peft_model(tiny("bert"), config_of("mlp", "bert"))
    rows = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(tokens(8))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    resumed = get_peft_model(tiny("bert"), config_of("mlp", "bert"))
    Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens()).logits, resumed.eval()(tokens()).logits)


def test_names_are_public() -> None:
    assert {"PromptTuningConfig", "PromptTuningInit", "PromptEncoderConfig"} <= set(peft_ext.__all__)
