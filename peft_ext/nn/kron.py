"""A linear layer whose weight is a sum of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.ops import kron_linear

Shape = tuple[int, int]


class KronLinear(nn.Module):
    r"""y = x H + b with H = Σᵢ Aᵢ ⊗ Bᵢ (or Aᵢ ⊗ Bᵢ ⊗ Cᵢ ...), never formed unless that is cheaper.

    Factor k is ``[in_k, out_k]``; the factors must tile the layer: the in_k multiply to ``in_features`` and the
    out_k to ``out_features``.

    Args:
        in_features, out_features: features of input and output.
        factors: shapes ``(in_k, out_k)`` of two or more factors. By default two of about equal sides. The product
            of all but the last is formed at every call: put the large factor last.
        num_kron_terms: terms of the sum.
        rank: the last factor of each term is s t of this rank. None: it is dense.
        bias: whether there is a bias, which starts at zero.
        device, dtype: of the parameters.

    Attributes:
        factors: one parameter ``[num_kron_terms, in_k, out_k]`` a factor; with ``rank`` the last one is
            s ``[num_kron_terms, in_k, rank]``.
        t: ``[num_kron_terms, rank, out_k]``, or None.
        bias: ``[out_features]``, or None.

    The factors start normal, with such a deviation that the elements of H have that of ``nn.Linear``'s weight.

    Raises:
        ValueError: for factors that do not tile the layer (the message has the nearest ones that do), fewer than
            two of them, and sizes that are not positive.

    Example:
        >>> import torch
        >>> from peft_ext import KronLinear
        >>> down, up = KronLinear(768, 64, [(8, 64), (96, 1)]), KronLinear(64, 768, [(64, 8), (1, 96)])
        >>> up(down(torch.zeros(2, 768))).shape
        torch.Size([2, 768])
        >>> sum(factor.numel() for factor in down.factors)
        608
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factors: Sequence[Shape] | None = None,
        *,
        num_kron_terms: int = 1,
        rank: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "num_kron_terms": num_kron_terms}
        check_sizes({**sizes, "rank": 1 if rank is None else rank})
        if factors is None:
            factors = list(zip(split_dimension(in_features), split_dimension(out_features), strict=True))
        check_factors(in_features, out_features, factors)
        self.in_features, self.out_features = in_features, out_features
        self.num_kron_terms, self.rank = num_kron_terms, rank
        self.shapes: list[Shape] = [(rows, columns) for rows, columns in factors]
        shapes = list(self.shapes)
        last_in, last_out = shapes[-1]
        if rank is not None:
            shapes[-1] = (last_in, rank)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.factors = nn.ParameterList([empty(num_kron_terms, *shape) for shape in shapes])
        self.t = None if rank is None else empty(num_kron_terms, rank, last_out)
        self.bias = empty(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new factors; the bias becomes zero."""
        tensors = [*self.factors, *([] if self.t is None else [self.t])]
        variance = 1 / (3 * self.in_features * self.num_kron_terms * (self.rank or 1))
        for tensor in tensors:
            nn.init.normal_(tensor, std=variance ** (0.5 / len(tensors)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        left, last = self.factors[0], self.factors[-1]
        for factor in self.factors[1:-1]:
            left = kron_terms(left, factor)
        return kron_linear(x, left, last, self.t, self.bias)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            f"{self.in_features}, {self.out_features}, {_shown(self.shapes)}, num_kron_terms={self.num_kron_terms}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def kron_terms(A: Tensor, B: Tensor) -> Tensor:
    """Aᵢ ⊗ Bᵢ for every i: ``[n, a, b]`` and ``[n, c, d]`` to ``[n, a c, b d]``."""
    n, a_in, a_out = A.shape
    _, b_in, b_out = B.shape
    return torch.einsum("npq,nuv->npuqv", A, B).reshape(n, a_in * b_in, a_out * b_out)


def split_dimension(dimension: int, factor: int = -1) -> Shape:
    """Two factors of ``dimension``, the smaller first: as near each other as divisors allow.

    Args:
        dimension: what is split.
        factor: above 0: if it divides ``dimension``, it is the first of the two; otherwise the bound of the smaller.

    Example:
        >>> split_dimension(768), split_dimension(127), split_dimension(128, 4), split_dimension(128, 3)
        ((24, 32), (1, 127), (4, 32), (2, 64))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor <= 0 else min(factor, math.isqrt(dimension))
    small = next(size for size in range(limit, 0, -1) if dimension % size == 0)
    return small, dimension // small


def check_factors(in_features: int, out_features: int, factors: Sequence[Shape]) -> None:
    """Raises a ValueError, with the nearest shapes that are right, for factors that do not tile the layer."""
    if len(factors) < 2 or any(len(shape) != 2 or min(shape) <= 0 for shape in factors):
        raise ValueError(f"factors must be two or more pairs (in, out) of positive sizes, got {list(factors)}")
    ins, outs = zip(*factors, strict=True)
    if math.prod(ins) == in_features and math.prod(outs) == out_features:
        return
    nearest = zip(_nearest_split(in_features, ins), _nearest_split(out_features, outs), strict=True)
    raise ValueError(
        f"factors {_shown(factors)} make a map of {math.prod(ins)} to {math.prod(outs)} features, "
        f"not of {in_features} to {out_features}; the nearest that do: {_shown(list(nearest))}"
    )


def _shown(factors: Sequence[Shape]) -> str:
    return " ⊗ ".join(f"{rows}x{columns}" for rows, columns in factors)


def _nearest_split(dimension: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The split of ``dimension`` that changes the fewest ``sizes``, and these the least; the first ones if in doubt."""

    def distance(split: tuple[int, ...]) -> tuple[int, float]:
        changed = [(new, old) for new, old in zip(split, sizes, strict=True) if new != old]
        return len(changed), round(sum(abs(math.log(new / old)) for new, old in changed), 9)

    return min(_splits(dimension, len(sizes)), key=distance)


def _splits(dimension: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered splits into ``parts`` divisors, large first parts first."""
    if parts == 1:
        yield (dimension,)
        return
    for first in range(dimension, 0, -1):
        if dimension % first == 0:
            yield from ((first, *rest) for rest in _splits(dimension // first, parts - 1))
