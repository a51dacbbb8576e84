"""LoRA of Hugging Face PEFT: accelerated against plain."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

import peft_ext

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

Make = Callable[..., nn.Module]

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "bias-of-lora": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"2": 3}, "alpha_pattern": {"4": 1}},
    "modules_to_save": {"target_modules": ["0", "2"], "modules_to_save": ["4"]},
}


class Net(nn.Module):
    """Linear and Conv1D layers around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = transformers.pytorch_utils.Conv1D(16, 8)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1d(x)
        return x + self.layers(x)


def adapted(model: nn.Module, **options) -> nn.Module:
    config = {"r": 2, "target_modules": ["0", "2", "4"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def two_adapters(model: nn.Module, first: tuple[str, ...] = ("0", "2", "4"), **options) -> nn.Module:
    model = adapted(model, target_modules=list(first), **options)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["2", "4"], init_lora_weights=False, **options))
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients(tiny, pair, assert_same, op_calls, x, options, dtype, training):
    theirs, ours = pair(adapted(tiny("mlp").to(dtype), **options).train(training))
    assert_same(theirs, ours, x.to(dtype))
    with op_calls() as counter:
        ours(x.to(dtype))
    assert counter.calls["lora_linear"] == len(layers_of(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_conv1d_and_dtypes_of_the_adapter(pair, assert_same, op_calls, x, dtype, cast):
    model = peft.get_peft_model(
        Net().to(dtype),
        peft.LoraConfig(r=2, target_modules=["conv1d", "0", "2"], init_lora_weights=False, fan_in_fan_out=True),
    )
    for layer in layers_of(model):
        layer.lora_A.to(cast)
        layer.lora_B.to(cast)
    theirs, ours = pair(model)
    # PEFT casts x to the adapter's type, ours does not
    assert_same(theirs, ours, x.to(dtype), coarsest=cast)
    with op_calls() as counter:
        ours(x.to(dtype))
    assert counter.calls["lora_linear"] == 3


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(tiny, pair, x, autocast):
    """As near to float64 as PEFT is."""
    theirs, ours = pair(adapted(tiny("mlp")))
    exact = copy.deepcopy(theirs).double()
    y = exact(x.double())
    want = [y, *torch.autograd.grad(y.sum(), [p for p in exact.parameters() if p.requires_grad])]
    errors = []
    for model in (theirs, ours):
        with torch.autocast("cpu", autocast):
            y = model(x)
        assert y.dtype == autocast
        got = [y, *torch.autograd.grad(y.sum(), [p for p in model.parameters() if p.requires_grad])]
        assert all(g.dtype == torch.float32 for g in got[1:])
        errors.append(torch.stack([(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]))
    assert errors[1].max() < 1.2 * errors[0].max()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_has_peft_s_distribution(tiny, pair, x, dora):
    """Mean and variance over draws; in eval mode there is none."""
    theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"], lora_dropout=0.4, use_dora=dora).train())
    count = 20_000
    draws = [model(x[0].expand(count, -1, -1)).detach() for model in (theirs, ours)]
    (mean, variance), (our_mean, our_variance) = [(draw.mean(0), draw.var(0)) for draw in draws]
    assert variance.max() > 1e-3
    assert (mean - our_mean).abs().max() < 6 * (2 * variance.max() / count).sqrt()
    assert (variance - our_variance).abs().max() < 0.1 * variance.max()
    assert not torch.equal(ours(x), ours(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_dropout_follows_the_manual_seed(tiny, pair, x):
    _, ours = pair(adapted(tiny("mlp"), lora_dropout=0.4).train())
    torch.manual_seed(5)
    first = ours(x)
    torch.manual_seed(5)
    assert torch.equal(first, ours(x))


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]])
def test_several_adapters(tiny, pair, assert_same, op_calls, x, active):
    theirs, ours = pair(two_adapters(tiny("mlp")))
    for model in (theirs, ours):
        model.base_model.set_adapter(active)
    assert_same(theirs, ours, x)
    with op_calls() as counter:
        ours(x)
    assert counter.calls["lora_linear"] == (2 if active == ["second"] else 3)


def test_several_adapters_with_dropout_are_peft_s(tiny, pair, assert_same, x):
    theirs, ours = pair(two_adapters(tiny("mlp"), first=["2", "4"], lora_dropout=0.3).train())
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    assert_same(theirs, ours, x, seed=3)


def test_add_switch_delete_and_scale(tiny, pair, x, op_calls):
    theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"]))
    torch.manual_seed(1)
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["0", "4"]))
        model.set_adapter("second")
    torch.testing.assert_close(ours(x), theirs(x))
    with op_calls() as counter:
        ours(x)
    assert counter.calls["lora_linear"] == 2, "a layer that is adapted later is accelerated too"
    for change in (
        lambda model: model.base_model.model[4].set_scale("second", 0.3),
        lambda model: model.base_model.model[0].scale_layer(2.0),
        lambda model: model.base_model.model[0].unscale_layer(),
        lambda model: model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="cat"),
        lambda model: model.set_adapter("both"),
        lambda model: model.delete_adapter("second"),
        lambda model: model.set_adapter("default"),
        lambda model: model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}),
    ):
        change(theirs.base_model if not hasattr(theirs, "add_weighted_adapter") else theirs)
        change(ours)
        assert ours.active_adapters == theirs.active_adapters
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging(tiny, pair, x, options, safe):
    theirs, ours = pair(two_adapters(tiny("mlp"), **options))
    before = ours(x)
    for model in (theirs, ours):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(ours(x), theirs(x)), "merged layers run PEFT's code"
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    merged = [model.merge_and_unload(safe_merge=safe) for model in (theirs, ours)]
    assert [type(m) for m in merged[1].modules()] == [type(m) for m in merged[0].modules()]
    assert torch.equal(merged[1](x), merged[0](x))


def test_disabling(tiny, pair, x):
    theirs, ours = pair(adapted(tiny("mlp")))
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_disabled_merged_model_is_unmerged(tiny, pair, x):
    theirs, ours = pair(adapted(tiny("mlp")))
    for model in (theirs, ours):
        model.merge_adapter()
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    assert not layers_of(ours)[0].merged


def test_state_flags_and_checkpoints_are_peft_s(tiny, pair, x, tmp_path):
    theirs, ours = pair(two_adapters(tiny("mlp"), modules_to_save=None))
    want, got = theirs.state_dict(), ours.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert repr(ours) == repr(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(p.relative_to(tmp_path / "theirs") for p in (tmp_path / "theirs").rglob("*") if p.is_file())
    assert len(files) >= 4
    for file in files:
        ours_file, theirs_file = tmp_path / "ours" / file, tmp_path / "theirs" / file
        if file.suffix == ".json":  # PEFT writes sets of names, in any order
            configs = [json.loads(path.read_text()) for path in (ours_file, theirs_file)]
            for config in configs:
                config["target_modules"].sort()
            assert configs[0] == configs[1]
        else:
            assert ours_file.read_bytes() == theirs_file.read_bytes()
    loaded = peft.PeftModel.from_pretrained(tiny("mlp"), tmp_path / "ours")
    assert torch.equal(loaded(x), theirs(x))


def test_same_objects(tiny):
    model = adapted(tiny("mlp"))
    modules, parameters = list(model.modules()), list(model.parameters())
    peft_ext.accelerate(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_copies_pickles_and_casts(tiny, pair, op_calls, x):
    theirs, ours = pair(adapted(tiny("mlp")))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert model is not ours
        with op_calls() as counter:
            assert torch.equal(model(x), ours(x))
        assert counter.calls["lora_linear"] == 6
    for dtype in (torch.bfloat16, torch.float64):
        torch.testing.assert_close(ours.to(dtype)(x.to(dtype)), theirs.to(dtype)(x.to(dtype)), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_compiles_in_one_graph(tiny, pair, x, options):
    _, ours = pair(adapted(tiny("mlp"), target_modules=["0"], **options).train())
    compiled = torch.compile(ours, fullgraph=True, backend="eager" if options else "aot_eager")
    compiled(x)
    if options.get("lora_dropout"):
        ours.eval()
    want, got = ours(x), compiled(x)
    torch.testing.assert_close(got, want)
    want, got = (torch.autograd.grad(y.sum(), [p for p in ours.parameters() if p.requires_grad]) for y in (want, got))
    torch.testing.assert_close(got, want)


def test_gradient_checkpointing(tiny, pair):
    theirs, ours = pair(
        peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    )
    ids = torch.randint(50, (2, 5))
    grads = []
    for model in (theirs, ours):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[1], grads[0])


TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("kind", TARGETS)
def test_transformers(tiny, pair, op_calls, kind):
    theirs, ours = pair(
        peft.get_peft_model(tiny(kind), peft.LoraConfig(target_modules=TARGETS[kind], init_lora_weights=False))
    )
    ids = torch.randint(50, (2, 5))
    with op_calls() as counter:
        got = ours(input_ids=ids).logits
    torch.testing.assert_close(got, theirs(input_ids=ids).logits)
    assert counter.calls["lora_linear"] == len(layers_of(ours))
    got.sum().backward()
    theirs(input_ids=ids).logits.sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)


class TestMixedBatches:
    names = ("default", "__base__", "second", "default", "second", "only_elsewhere")

    @pytest.fixture
    def models(self, tiny, pair):
        model = two_adapters(tiny("mlp"))
        model.add_adapter("only_elsewhere", peft.LoraConfig(r=2, target_modules=["4"], init_lora_weights=False))
        return pair(model.eval())

    def test_equals_peft(self, models, op_calls):
        theirs, ours = models
        for shape in ((6, 8), (6, 4, 8)):
            x = torch.randn(shape)
            with op_calls() as counter:
                got = ours(x, adapter_names=list(self.names))
            torch.testing.assert_close(got, theirs(x, adapter_names=list(self.names)))
            assert counter.calls == {"multi_lora_linear": 3}
            with ours.disable_adapter():
                base = ours(x)
            assert torch.equal(ours(x, adapter_names=["__base__"] * 6), base)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtypes(self, models, dtype):
        theirs, ours = (model.to(dtype) for model in models)
        for layer in layers_of(theirs) + layers_of(ours):
            layer.scaling = dict.fromkeys(layer.scaling, 1 / 3)
        x = torch.randn(6, 4, 8, dtype=dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 5e-2
        want, got = (model(x, adapter_names=list(self.names)) for model in (theirs, ours))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    def test_equals_one_adapter_at_a_time(self, models):
        _, ours = models
        x = torch.randn(6, 4, 8)
        mixed = ours(x, adapter_names=list(self.names))
        for i, name in enumerate(self.names):
            if name == "__base__":
                with ours.disable_adapter():
                    want = ours(x[i : i + 1])
            else:
                ours.set_adapter(name)
                want = ours(x[i : i + 1])
            torch.testing.assert_close(mixed[i : i + 1], want)

    def test_errors_are_peft_s(self, models):
        theirs, ours = models
        x = torch.randn(6, 8)
        cases = [lambda m: m(x, adapter_names=["default"] * 5), lambda m: m(x, adapter_names=["nobody"] * 6)]
        cases += [lambda m: m.train()(x, adapter_names=["default"] * 6)]
        for case in cases:
            messages = []
            for model in (theirs, ours):
                with pytest.raises(ValueError) as error:
                    case(model)
                messages.append(str(error.value))
            assert messages[0] == messages[1]

    def test_dora_and_merged_raise(self, tiny, pair):
        _, ours = pair(two_adapters(tiny("mlp"), use_dora=True).eval())
        with pytest.raises(ValueError, match="DoRA"):
            ours(torch.randn(2, 8), adapter_names=["default", "second"])
        _, ours = pair(two_adapters(tiny("mlp")).eval())
        ours.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            ours(torch.randn(2, 8), adapter_names=["default", "second"])

    def test_generate(self, tiny, pair):
        model = peft.get_peft_model(
            tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        )
        model.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        theirs, ours = pair(model.eval())
        ids = torch.randint(1, 50, (3, 4))
        for beams in (1, 2):
            options = {
                "max_new_tokens": 4,
                "do_sample": False,
                "num_beams": beams,
                "attention_mask": torch.ones_like(ids),
            }
            names = ["default", "__base__", "second"]
            want, got = (m.generate(input_ids=ids, adapter_names=names, **options) for m in (theirs, ours))
            assert torch.equal(want, got)


class TestPeftsPath:
    """What the ops do not compute runs PEFT's forward: bit for bit."""

    def check(self, theirs, ours, x, op_calls, calls=0):
        with op_calls() as counter:
            got = ours(x)
        assert torch.equal(got, theirs(x))
        assert counter.calls["lora_linear"] == calls

    @pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
    def test_hooks_on_inner_modules_run(self, tiny, pair, op_calls, x, part):
        theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"]))
        seen = []
        for model in (theirs, ours):
            inner = getattr(model.base_model.model[0], part)
            inner = inner if part == "base_layer" else inner["default"]
            inner.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
        self.check(theirs, ours, x, op_calls)
        assert len(seen) == 2

    def test_global_hooks_run(self, tiny, pair, op_calls, x):
        theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"]))
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        try:
            theirs(x)
            want, seen[:] = list(seen), []
            ours(x)
            assert seen == want
        finally:
            handle.remove()

    def test_a_trained_base_weight(self, tiny, pair, assert_same, op_calls, x):
        theirs, ours = pair(adapted(tiny("mlp")))
        for model in (theirs, ours):
            model.requires_grad_(True)
        self.check(theirs, ours, x, op_calls)
        assert_same(theirs, ours, x)

    def test_a_wrong_input_raises_what_peft_raises(self, tiny, pair):
        theirs, ours = pair(adapted(tiny("mlp")))
        for bad in (torch.randn(2, 7), torch.randn(2, 8).double(), torch.randn(2, 8).long(), torch.tensor(1.0)):
            errors = []
            for model in (theirs, ours):
                with pytest.raises((RuntimeError, IndexError)) as error:
                    model(bad)
                errors.append((type(error.value), str(error.value)))
            assert errors[0] == errors[1]

    def test_dora_caching(self, tiny, pair, op_calls, x, monkeypatch):
        theirs, ours = pair(adapted(tiny("mlp"), use_dora=True).eval())
        monkeypatch.setattr(peft.tuners.lora.dora, "ENABLE_DORA_CACHING", True)
        self.check(theirs, ours, x, op_calls)

    def test_no_input_dtype_casting(self, tiny, pair, op_calls, x):
        theirs, ours = pair(adapted(tiny("mlp")))
        with peft.helpers.disable_input_dtype_casting(ours):
            self.check(theirs, ours, x, op_calls)

    def test_a_scaling_that_is_a_tensor(self, tiny, pair, op_calls, x):
        theirs, ours = pair(adapted(tiny("mlp")))
        for layer in layers_of(theirs) + layers_of(ours):
            layer.scaling["default"] = torch.tensor(0.5)
        self.check(theirs, ours, x, op_calls)
