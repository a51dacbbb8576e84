"""``add_weighted_adapter``: Hugging Face PEFT is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext import LoKrConfig, LoraConfig, get_peft_model

peft = pytest.importorskip("peft")
ADAPTERS, WEIGHTS = ["a", "b", "c"], [0.7, -0.4, 1.2]


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))


TARGETS = {"mlp": [["0", "1", "3"], ["1", "3"], ["3"]], "conv": [["0", "2"], ["0", "2"], ["2"]]}
"""Not every layer has every adapter."""


def adapted(library: Any, kind: str, ranks: tuple[int, ...]) -> Any:
    configs = [
        library.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        for rank, alpha, targets in zip(ranks, (3, 8, 5), TARGETS[kind], strict=True)
    ]
    model = library.get_peft_model(base(kind), configs[0], "a")
    model.add_adapter("b", configs[1])
    model.add_adapter("c", configs[2])
    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def output(model: nn.Module, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "mlp":
        return model(torch.randint(20, (3, 5), generator=generator))
    return model(torch.randn(2, 3, 6, 6, generator=generator))


def every_third(probabilities: Tensor, **_: Any) -> Tensor:
    """In place of chance, so that both libraries drop the same."""
    kept = torch.arange(probabilities.numel()) % 3 != 0
    return kept.view(probabilities.shape).to(probabilities.dtype)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("combination", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"svd_rank": 3, "svd_full_matrices": False}),
        ("ties", {"density": 0.5}),
        ("ties_svd", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("dare_linear", {"density": 0.6}),
        ("dare_linear_svd", {"density": 0.6}),
        ("dare_ties", {"density": 0.6}),
        ("magnitude_prune", {"density": 0.6}),
        ("magnitude_prune_svd", {"density": 0.6}),
    ],
)
def test_outputs_are_hugging_face_pefts(
    monkeypatch: pytest.MonkeyPatch, kind: str, combination: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "bernoulli", every_third)
    ranks = (2, 4, 3) if combination.endswith("svd") or combination == "cat" else (4, 4, 4)
    theirs, ours = adapted(peft, kind, ranks), adapted(peft_ext, kind, ranks)
    for model in (theirs, ours):
        model.add_weighted_adapter(ADAPTERS, WEIGHTS, "new", combination_type=combination, **options)
        model.set_adapter("new")
    torch.testing.assert_close(output(ours, kind), output(theirs, kind), rtol=1e-4, atol=1e-4)
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r


def test_clamping_is_hugging_face_pefts() -> None:
    """The quantile depends on the signs of singular vectors, so on one and the same matrix only."""
    theirs, ours = adapted(peft, "conv", (2, 4, 3)), adapted(peft_ext, "conv", (2, 4, 3))
    for model in (theirs, ours):
        model.add_weighted_adapter(ADAPTERS, WEIGHTS, "new", "svd", svd_rank=3, svd_clamp=0.9)
        model.set_adapter("new")
    torch.testing.assert_close(output(ours, "conv"), output(theirs, "conv"), rtol=1e-3, atol=1e-3)


def test_cat_is_the_weighted_sum(tmp_path: Any) -> None:
    model = adapted(peft_ext, "mlp", (2, 4, 3)).double()
    model.add_weighted_adapter(["b", "c"], [0.5, -2.0], "new", combination_type="cat")
    layer = model.get_submodule("base_model.model.3")
    weight = layer.base_layer.weight.clone()
    changes = {}
    for name in ("b", "c", "new"):
        model.merge_adapter([name])
        changes[name] = layer.base_layer.weight - weight
        model.unmerge_adapter()
    torch.testing.assert_close(changes["new"], 0.5 * changes["b"] - 2 * changes["c"])
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = peft_ext.PeftModel.from_pretrained(base("mlp").double(), tmp_path / "new")
    model.set_adapter("new")
    torch.testing.assert_close(output(again, "mlp"), output(model, "mlp"))


def test_rslora_and_the_trained_head() -> None:
    """Where Hugging Face PEFT scales a combination of rsLoRA adapters once more, and forgets the head's values."""
    config = LoraConfig(r=4, use_rslora=True, target_modules=["1"], modules_to_save=["3"], init_lora_weights=False)
    model = get_peft_model(base("mlp"), config, "a")
    nn.init.ones_(model.get_submodule("base_model.model.3").modules_to_save["a"].weight)
    model.add_weighted_adapter(["a"], [1.0], "new")
    expected = output(model, "mlp")
    model.set_adapter("new")
    torch.testing.assert_close(output(model, "mlp"), expected)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"combination_type": "mean"}, "combination_type must be one of"),
    ({"combination_type": "linear"}, r"needs adapters of one rank, got \[2, 4, 3\]"),
    ({"combination_type": "ties_svd"}, r"needs a density in \[0, 1\], got None"),
    ({"combination_type": "ties_svd", "density": 2}, r"needs a density in \[0, 1\], got 2"),
    ({"combination_type": "ties_svd", "density": 0.5, "majority_sign_method": "x"}, "majority_sign_method"),
    ({"adapters": ["a", "x"], "weights": [1, 1]}, "there is no adapter 'x'"),
    ({"weights": [1]}, "one number for each of 3 adapters, got 1"),
    ({"adapters": [], "weights": []}, "at least one adapter"),
    ({"adapter_name": "a"}, "there is an adapter 'a' already"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(
    snapshot: Callable[..., Any], same: Callable[..., bool], arguments: dict[str, Any], message: str
) -> None:
    model = adapted(peft_ext, "mlp", (2, 4, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ADAPTERS, "weights": WEIGHTS, "adapter_name": "new"} | arguments)
    assert same(model, before)


def test_what_cannot_be_combined() -> None:
    lokr = get_peft_model(base("mlp"), LoKrConfig(r=2, target_modules=["1"]), "a")
    with pytest.raises(ValueError, match="is for LoRA"):
        lokr.add_weighted_adapter(["a"], [1.0], "new")
    dora = get_peft_model(base("mlp"), LoraConfig(r=2, target_modules=["1"], use_dora=True), "a")
    with pytest.raises(ValueError, match="has DoRA"):
        dora.add_weighted_adapter(["a"], [1.0], "new")
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["3"])
    heads = get_peft_model(base("mlp"), config, "a")
    heads.add_adapter("b", config)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have copies of '3'"):
        heads.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
