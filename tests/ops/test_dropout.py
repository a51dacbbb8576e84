"""The seed of the ops' dropout. What the dropout does with it is tested with each op."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from peft_ext.ops._dropout import draw_seed


def wanted_seed(device):
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (1,), device=device)


def test_seeds_are_those_of_randint(device):
    x = torch.ones(3, device=device)
    torch.manual_seed(5)
    drawn = [draw_seed(x) for _ in range(20)]
    torch.manual_seed(5)
    assert drawn == [wanted_seed(device) for _ in range(20)]
    assert len({int(seed) for seed in drawn}) == 20
    assert all(seed.dtype == torch.int64 and seed.shape == (1,) and seed.device == x.device for seed in drawn)


def test_seeds_of_inference_and_autocast(device):
    x = torch.ones(3, device=device)
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16):
        drawn = draw_seed(x)
    torch.manual_seed(5)
    assert drawn == wanted_seed(device)
    assert drawn.is_inference()


def test_modes_and_transforms_see_the_draw(device):
    x = torch.ones(3, device=device)
    assert "aten.randint" in make_fx(draw_seed)(x).code
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw_seed)(x)
    assert torch.vmap(draw_seed, randomness="different")(x).unique().numel() == 3
    with FakeTensorMode():
        assert isinstance(draw_seed(torch.ones(3, device=device)), FakeTensor)


def test_a_trace_draws_anew_at_each_call(device):
    x = torch.ones(3, device=device)
    traced = torch.jit.trace(draw_seed, (x,), check_trace=False)
    assert traced(x) != traced(x)
