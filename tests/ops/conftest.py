"""Random problems for the LoRA ops, and their solution in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from peft_ext import ops, reference

# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class LoraProblem:
    """Arguments of lora_linear, or of merged_lora_linear where ``enable_lora`` is given."""

    rows: tuple[int, ...] = (5,)
    in_features: int = 16
    out_features: int = 12
    rank: int = 4
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    transposed: bool = False
    dropout_p: float = 0.0
    enable_lora: list[bool] | None = None
    device: torch.device | str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype)

        adapter_dtype = self.adapter_dtype or self.dtype
        flags = self.enable_lora or [True]
        weight = random(self.in_features, self.out_features).t() if self.transposed else None
        self.tensors = {
            "x": random(*self.rows, self.in_features),
            "weight": random(self.out_features, self.in_features) if weight is None else weight,
            "bias": random(self.out_features) if self.bias else None,
            "lora_A": random(sum(flags) * self.rank, self.in_features, dtype=adapter_dtype),
            "lora_B": random(self.out_features // len(flags) * sum(flags), self.rank, dtype=adapter_dtype),
        }
        self.seed = torch.tensor([0x123456789ABCDEF], device=self.device) if self.dropout_p else None
        self.scaling = 0.5

    def call(self, op: Callable[..., Tensor], **tensors: Tensor | None) -> Tensor:
        flags = [] if self.enable_lora is None else [self.enable_lora]
        values = {**self.tensors, **tensors}.values()
        return op(*values, *flags, self.scaling, dropout_p=self.dropout_p, seed=self.seed)

    @property
    def op(self) -> Callable[..., Tensor]:
        return ops.lora_linear if self.enable_lora is None else ops.merged_lora_linear

    @property
    def oracle(self) -> Callable[..., Tensor]:
        return reference.lora_linear if self.enable_lora is None else reference.merged_lora_linear

    def solve(
        self, op: Callable[..., Tensor], dtype: torch.dtype | None = None, needs: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Output and gradients by name, optionally with everything cast to ``dtype`` first."""
        names = [n for n in ("x", "bias", "lora_A", "lora_B") if self.tensors[n] is not None]
        needs = tuple(names) if needs is None else needs
        tensors = {
            name: tensor if tensor is None else tensor.to(dtype or tensor.dtype).detach().requires_grad_(name in needs)
            for name, tensor in self.tensors.items()
        }
        y = self.call(op, **tensors)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype).to(y)
        grads = torch.autograd.grad(y, [tensors[n] for n in needs], grad_y) if needs else []
        return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}

    def check(self) -> None:
        """The op against its oracle in float64."""
        got, wanted = self.solve(self.op), self.solve(self.oracle, torch.float64)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.adapter_dtype or self.dtype])
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            like = self.tensors["x" if name == "y" else name]
            assert value.dtype == like.dtype, name
            assert value.shape == wanted[name].shape, name
            if value.numel():
                scale = wanted[name].abs().max().clamp_min(1e-30)
                error = ((value.double() - wanted[name]).abs().max() / scale).item()
                assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


@pytest.fixture
def same_roundings() -> Callable[[Tensor, Tensor], None]:
    """Equality of half precisions, but where another order of float32 sums tips the one rounding of an element.

    On CUDA the branch is rounded before the base is added, not the base before the branch is: as good, not the same.
    """

    def check(got: Tensor, wanted: Tensor) -> None:
        assert got.dtype == wanted.dtype
        assert got.dtype in (torch.bfloat16, torch.float16)
        if got.is_cuda:
            assert (got - wanted).abs().max() <= torch.finfo(got.dtype).eps * wanted.abs().max()
        else:
            assert (got != wanted).double().mean() < 0.02

    return check


@pytest.fixture
def lora_problem(device: torch.device) -> Callable[..., LoraProblem]:
    def make(**options: object) -> LoraProblem:
        return LoraProblem(device=device, **options)

    return make


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
