"""Initial values of a LoRA pair, by the name that ``init_lora_weights`` gives.

``pissa`` and ``olora`` start from the base weight's own factors and take them out of it, so that
the adapted layer still computes what the plain one did.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

Init = bool | str
_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


class Factors(NamedTuple):
    """A ``[r, in]`` and B ``[out, r]``."""

    A: Tensor
    B: Tensor


def changes_base(init: Init) -> bool:
    """Whether s B A of the initial factors is to be taken out of the base weight."""
    return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))


def check_init(init: Init) -> Init:
    """``init``, if it is one of those that exist.

    Raises:
        ValueError: if not.
    """
    known = ("gaussian", "pissa", "olora", "orthogonal")
    if isinstance(init, bool):
        return init
    if isinstance(init, str) and (init.lower() in known or _PISSA_NITER.fullmatch(init.lower())):
        return init.lower()
    raise ValueError(
        f"init_lora_weights={init!r} is not supported: must be True, False, one of {known} or 'pissa_niter_N'"
    )


@torch.no_grad()
def linear_factors(weight: Tensor, rank: int, scaling: float, init: Init) -> Factors:
    """Factors for a weight ``[out, in]``, on its device, in float32 (float64 for a float64 weight)."""
    out_features, in_features = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if init == "pissa" or (isinstance(init, str) and init.startswith("pissa_niter_")):
        return _pissa(weight.to(dtype), rank, scaling, init)
    if init == "olora":
        q, r = torch.linalg.qr(weight.to(dtype))
        return Factors(r[:rank].contiguous(), q[:, :rank].contiguous())
    if init == "orthogonal":
        return _orthogonal(in_features, out_features, rank, dtype, weight.device)
    A = torch.empty(rank, in_features, dtype=dtype, device=weight.device)
    B = torch.zeros(out_features, rank, dtype=dtype, device=weight.device)
    if init == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return Factors(A, B)


def _pissa(weight: Tensor, rank: int, scaling: float, init: str) -> Factors:
    """The principal singular vectors, each factor with the root of the values (Meng et al., 2024)."""
    niter = _PISSA_NITER.fullmatch(init)
    if niter:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(niter.group(1)))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root)


def _orthogonal(in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> Factors:
    """A and B through the odd and the even rows of one orthogonal matrix, so that B A is zero."""
    q, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype, device=device))
    left = torch.randn(in_features, rank // 2, dtype=dtype, device=device)
    right = torch.randn(rank // 2, out_features, dtype=dtype, device=device)
    return Factors((left @ q[0::2]).T.contiguous() / 10, (right.T @ q[1::2]).contiguous() / 10)


@torch.no_grad()
def embedding_factors(weight: Tensor, rank: int, init: Init) -> Factors:
    """Factors for an embedding ``[rows, dim]``: A ``[r, rows]`` is zero and B ``[dim, r]`` normal."""
    rows, dim = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A = torch.zeros(rank, rows, dtype=dtype, device=weight.device)
    if init is False:
        nn.init.normal_(A)
    return Factors(A, nn.init.normal_(torch.empty(dim, rank, dtype=dtype, device=weight.device)))
