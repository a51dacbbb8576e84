from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from peft_ext import KronLinear
from peft_ext.nn.kron import split_dimension


def dense_weight(layer: KronLinear) -> Tensor:
    """H ``[in, out]`` by torch.kron."""
    *left, last = layer.factors
    last = last if layer.t is None else last @ layer.t
    return sum(reduce(torch.kron, [factor[i] for factor in (*left, last)]) for i in range(layer.num_kron_terms))


@pytest.mark.parametrize(
    ("in_features", "out_features", "factors", "options"),
    [
        (12, 20, None, {}),
        (12, 20, None, {"num_kron_terms": 3, "rank": 2, "bias": False}),
        (12, 30, [(2, 3), (3, 2), (2, 5)], {"num_kron_terms": 2}),
        (24, 30, [(2, 3), (3, 2), (2, 1), (2, 5)], {"rank": 1}),
        (7, 13, None, {}),
    ],
)
def test_equals_dense_kron(in_features, out_features, factors, options):
    layer = KronLinear(in_features, out_features, factors, dtype=torch.float64, **options)
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    wanted = x @ dense_weight(layer)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
        wanted = wanted + layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_starts_with_the_deviation_of_a_linear_layer():
    for options in ({}, {"num_kron_terms": 4, "rank": 8}, {"factors": [(4, 4), (8, 8), (8, 8)]}):
        weights = torch.stack([dense_weight(KronLinear(256, 256, **options)) for _ in range(20)])
        assert weights.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.3)


def test_the_reference_texts_factors():
    """8x64 and 96x1 map 768 to 64; 1x8 and 1x96 do not map 64 to 768: 64x8 and 1x96 do."""
    down = KronLinear(768, 64, [(8, 64), (96, 1)], bias=False)
    assert sum(p.numel() for p in down.parameters()) == 512 + 96
    with pytest.raises(ValueError, match=r"1x8 ⊗ 1x96 make a map of 1 to 768.*not of 64 to 768.*64x8 ⊗ 1x96"):
        KronLinear(64, 768, [(1, 8), (1, 96)])
    up = KronLinear(64, 768, [(64, 8), (1, 96)], bias=False)
    assert up(down(torch.randn(3, 768))).shape == (3, 768)
    assert sum(math.prod(shape) for shape in ((8, 64), (96, 1), (1, 8), (1, 96))) == 712


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([(3, 4), (4, 6)], "make a map of 12 to 24 features, not of 12 to 20; the nearest that do: 3x4 ⊗ 4x5"),
        ([(5, 4), (3, 5)], "the nearest that do: 4x4 ⊗ 3x5"),
        ([(12, 20)], "two or more pairs"),
        ([(0, 4), (4, 5)], "positive"),
    ],
)
def test_factors_that_do_not_tile(factors, message):
    with pytest.raises(ValueError, match=message):
        KronLinear(12, 20, factors)


@pytest.mark.parametrize("options", [{"rank": 0}, {"num_kron_terms": 0}])
def test_sizes_that_are_not_positive(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer > 0"):
        KronLinear(12, 20, **options)


def test_splits_as_hugging_face_peft():
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for dimension in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 8, 30):
            assert split_dimension(dimension, factor) == factorization(dimension, factor)
