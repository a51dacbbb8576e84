"""LoKr of Hugging Face PEFT: accelerated against plain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import peft_ext

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

OPTIONS = {
    "dense": {"r": 16},
    "low rank": {"r": 2},
    "both low rank": {"r": 1, "decompose_both": True},
    "factor": {"r": 2, "decompose_factor": 2},
    "scaled": {"r": 2, "alpha": 5},
}


def adapted(model: nn.Module, **options) -> nn.Module:
    config = {"r": 2, "target_modules": ["0", "2", "4"], "init_weights": False, **options}
    return peft.get_peft_model(model, peft.LoKrConfig(**config))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients(tiny, pair, assert_same, op_calls, x, options, dtype):
    theirs, ours = pair(adapted(tiny("mlp").to(dtype), **options))
    assert_same(theirs, ours, x.to(dtype))
    with op_calls() as counter:
        ours(x.to(dtype))
    assert counter.calls["kron_linear"] == 3


@pytest.mark.parametrize(
    "options", [{"rank_dropout": 0.3}, {"rank_dropout": 0.3, "rank_dropout_scale": True}, {"module_dropout": 0.5}]
)
def test_dropout_draws_what_peft_draws(tiny, pair, assert_same, x, options):
    theirs, ours = pair(adapted(tiny("mlp"), **options).train())
    for seed in range(5):
        assert_same(theirs, ours, x, seed=seed)


def test_adapters_come_and_go(tiny, pair, assert_same, op_calls, x):
    theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"]))
    for model in (theirs, ours):
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoKrConfig(r=1, target_modules=["0", "4"], init_weights=False))
        model.base_model.set_adapter(["default", "second"])
    assert_same(theirs, ours, x)
    with op_calls() as counter:
        ours(x)
    assert counter.calls["kron_linear"] == 3
    for model in (theirs, ours):
        model.delete_adapter("default")
    assert_same(theirs, ours, x)


def test_merging_and_disabling(tiny, pair, x):
    theirs, ours = pair(adapted(tiny("mlp")))
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    for model in (theirs, ours):
        model.unmerge_adapter()
    with theirs.disable_adapter(), ours.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


def test_state_and_repr_are_peft_s(tiny, pair):
    theirs, ours = pair(adapted(tiny("mlp")))
    assert {k: v.tolist() for k, v in theirs.state_dict().items()} == {
        k: v.tolist() for k, v in ours.state_dict().items()
    }
    assert repr(theirs) == repr(ours)


def test_autocast(tiny, pair, x):
    theirs, ours = pair(adapted(tiny("mlp"), target_modules=["0"]))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(x), ours(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_compiles_in_one_graph(tiny, pair, x):
    """In evaluation; PEFT's module dropout draws a number to branch on, also at 0."""
    _, ours = pair(adapted(tiny("mlp"), target_modules=["0"]).eval())
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))


def test_convolutions_are_left(tiny):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    model = adapted(model, target_modules=["0", "2"])
    plain = copy.deepcopy(model)
    report = peft_ext.accelerate(model)
    assert report.layers == {"base_model.model.2": "kron_linear"}
    assert report.left == {"base_model.model.0": "there is no op for lokr.layer.Conv2d"}
    torch.testing.assert_close(model(torch.ones(1, 3, 4, 4)), plain(torch.ones(1, 3, 4, 4)))
