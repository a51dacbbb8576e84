"""Prefix tuning of Hugging Face PEFT: accelerated against plain."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import peft_ext

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
TOKENS = 3


def adapted(tiny, kind, **options):
    model = tiny(kind)
    config = peft.PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=TOKENS, **options)
    return peft.get_peft_model(model.bert if kind == "bert" else model, config).eval()


def ids(length: int = 5) -> torch.Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))


def padding() -> torch.Tensor:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    return mask


class Caller(torch.nn.Module):
    """The model on fixed input, as a function of nothing: for gradients of the prefix."""

    def __init__(self, model, mask, **options):
        super().__init__()
        self.model, self.mask, self.options = model, mask, options

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=self.mask, **self.options)[0]


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 8}], ids=["plain", "mlp"])
@pytest.mark.parametrize("mask", [None, "ones", "padding"])
@pytest.mark.parametrize("kind", TASKS)
def test_outputs_and_gradients(tiny, pair, assert_same, op_calls, kind, mask, options):
    theirs, ours = pair(adapted(tiny, kind, **options))
    mask = {None: None, "ones": torch.ones(2, 5, dtype=torch.long), "padding": padding()}[mask]
    assert_same(Caller(theirs, mask), Caller(ours, mask), ids())
    with op_calls() as counter:
        ours(input_ids=ids(), attention_mask=mask)
    assert counter.calls["prefix_attention"] == 2


def gradient(model):
    """Of the prefix, for some loss."""
    logits = model(input_ids=ids())[0]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (grad,) = torch.autograd.grad((logits * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    return grad


@pytest.mark.parametrize("kind", TASKS)
def test_half_precision_and_autocast(tiny, pair, kind):
    theirs, ours = pair(adapted(tiny, kind))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(input_ids=ids())[0], ours(input_ids=ids())[0]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    exact, want, got = (gradient(model) for model in (copy.deepcopy(theirs).double(), theirs, ours))
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 1.5 * (want - exact).abs().max(), "ours may not be farther off than theirs"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cache_reads_as_peft_s(tiny, pair, op_calls, kind):
    """Going on with the cache that came back, by the base model, for several tokens."""
    theirs, ours = pair(adapted(tiny, kind))
    caches = []
    for model in (theirs, ours):
        with torch.no_grad():
            caches.append(model(input_ids=ids(), use_cache=True).past_key_values)
    want, got = caches
    assert type(got) is type(want)
    assert got.get_seq_length() == want.get_seq_length() == TOKENS + 5
    for layer, (theirs_layer, ours_layer) in enumerate(zip(want.layers, got.layers, strict=True)):
        torch.testing.assert_close(ours_layer.keys, theirs_layer.keys)
        torch.testing.assert_close(ours_layer.values, theirs_layer.values)
        assert got.get_mask_sizes(1, layer) == want.get_mask_sizes(1, layer)
    for new in (ids(1), ids(2)):
        with torch.no_grad(), op_calls() as counter:
            logits = ours.get_base_model()(input_ids=new, past_key_values=got).logits
            torch.testing.assert_close(logits, theirs.get_base_model()(input_ids=new, past_key_values=want).logits)
        assert counter.calls["prefix_attention"] == 2
    for method, argument in (
        ("crop", -2),
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([1])),
    ):
        one, other = copy.deepcopy(want), copy.deepcopy(got)
        for cache in (one, other):
            getattr(cache, method)(argument)
        torch.testing.assert_close(other.layers[1].keys, one.layers[1].keys)
        torch.testing.assert_close(other.layers[1].values, one.layers[1].values)
        new = ids(1)[:1].expand(len(one.layers[0].keys), -1)
        with torch.no_grad():
            logits = ours.get_base_model()(input_ids=new, past_key_values=other).logits
            torch.testing.assert_close(logits, theirs.get_base_model()(input_ids=new, past_key_values=one).logits)
    got.reset()
    assert got.get_seq_length() == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_is_peft_s(tiny, pair, kind, options):
    theirs, ours = pair(adapted(tiny, kind))
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    want, got = (m.generate(input_ids=ids(), attention_mask=torch.ones_like(ids()), **options) for m in (theirs, ours))
    assert torch.equal(want, got)


@pytest.mark.slow
def test_compiles_in_one_graph(tiny, pair):
    theirs, ours = pair(adapted(tiny, "llama"))
    got = torch.compile(ours, fullgraph=True, backend="eager")(input_ids=ids()).logits
    torch.testing.assert_close(got, theirs(input_ids=ids()).logits)


def test_several_prefixes_checkpoints_and_copies(tiny, pair, tmp_path):
    theirs, ours = pair(adapted(tiny, "llama"))
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter("second", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
        model.set_adapter("second")
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "second").eval()
    torch.testing.assert_close(loaded(input_ids=ids()).logits, ours(input_ids=ids()).logits)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(model(input_ids=ids()).logits, ours(input_ids=ids()).logits)


def test_other_models_in_the_process_are_untouched(tiny, pair):
    before = tiny("llama")(input_ids=ids()).logits
    pair(adapted(tiny, "llama"))
    assert torch.equal(tiny("llama")(input_ids=ids()).logits, before)


def test_eager_attention_is_left(tiny, op_calls):
    model = adapted(tiny, "gpt2")
    model.get_base_model().set_attn_implementation("eager")
    report = peft_ext.accelerate(model)
    assert report.left == {"prompt_encoder.default": "attn_implementation is 'eager', not 'sdpa'"}
    assert type(model) is peft.PeftModelForCausalLM


def test_eager_attention_later(tiny, pair, op_calls):
    """Also for attentions, which only that returns."""
    theirs, ours = pair(adapted(tiny, "llama"))
    cache = ours(input_ids=ids()).past_key_values
    for model in (theirs, ours):
        model.get_base_model().set_attn_implementation("eager")
    with op_calls() as counter:
        got = ours(input_ids=ids(), output_attentions=True)
    want = theirs(input_ids=ids(), output_attentions=True)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.attentions[1], want.attentions[1])
    assert not counter.calls
    # a cache made before is whole for attention that knows nothing of it
    ours.get_base_model()(input_ids=ids(1), past_key_values=cache)
    assert cache.layers[0].keys.shape == (2, 2, TOKENS + 6, 4)


def test_restore(tiny, pair, op_calls):
    theirs, ours = pair(adapted(tiny, "llama"))
    peft_ext.restore(ours)
    assert type(ours) is peft.PeftModelForCausalLM
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in ours.modules())
    assert not any(m._forward_pre_hooks_with_kwargs or m._forward_hooks_always_called for m in ours.modules())
    with op_calls() as counter:
        assert torch.equal(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)
    assert not counter.calls


def test_other_prompts_are_left(tiny):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    report = peft_ext.accelerate(peft.get_peft_model(tiny("llama"), config))
    assert report.left == {"prompt_encoder.default": "there is no op for PROMPT_TUNING"}
