"""Counter-based dropout: the keep-mask is a pure function of (seed, row, column).

Nothing but the seed is stored between forward and backward. The generator is Philox4x32-7
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose seven rounds are the
fewest that pass all tests of BigCrush there. One Philox block serves
eight neighbouring columns with sixteen bits each, so the probability is a multiple of 2**-16;
the scale 1/(1-p) uses that rounded probability, which keeps the expectation exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_COLUMNS_PER_BLOCK = 8


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of an unsigned 32 x 32 bit product, held in int64 (which wraps)."""
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """The sixteen-bit value below which an element is dropped."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """Factor of the kept elements: 1/(1-p) for p rounded to a multiple of 2**-16; 0 if none is kept."""
    kept = 65536 - dropout_threshold(p)
    return 65536 / kept if kept else 0.0


def dropout_mask(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """Keep-mask, bool [rows, columns], of probability ``p`` under ``seed`` (int64, one element)."""
    device = seed.device
    blocks = (columns + _COLUMNS_PER_BLOCK - 1) // _COLUMNS_PER_BLOCK
    row = torch.arange(rows, device=device).view(-1, 1).expand(rows, blocks)
    block = torch.arange(blocks, device=device).view(1, -1).expand(rows, blocks)
    seed = seed.reshape(())
    words = _philox(
        [block & _MASK32, torch.zeros_like(block), row & _MASK32, row >> 32],
        [seed & _MASK32, (seed >> 32) & _MASK32],
    )
    halves = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)
    return halves.flatten(1)[:, :columns] >= dropout_threshold(p)


def apply_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``x`` [..., columns] with elements dropped at probability ``p``; leading sizes count as rows."""
    if p == 0.0 or seed is None:
        return x
    columns = x.size(-1)
    rows = x.numel() // columns if columns else 0
    mask = dropout_mask(rows, columns, p, seed).view(x.shape)
    return torch.where(mask, x * dropout_scale(p), 0.0)
