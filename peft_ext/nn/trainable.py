"""Which parameters train, and how many there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn


def freeze_except(model: nn.Module, pattern: str | Sequence[str]) -> tuple[int, int]:
    r"""Trains the parameters whose name matches ``pattern`` and freezes all others.

    A parameter shared by several modules has several names and trains if any of them matches.

    The tempting ``param.requires_grad = 'lora' in name.lower() or 'A' in name or 'B' in name`` trains
    too much: every name with a capital A or B, such as T5's ``SelfAttention.q.weight``, and the base
    weight under a module that happens to be called ``lora_q``. Anchor the pattern instead:
    ``r"lora_[AB]$"`` is the factors of LoRA and nothing else.

    Args:
        model: changed in place: ``requires_grad`` of every parameter is set.
        pattern: a regular expression, or several, searched in the names that
            ``model.named_parameters()`` gives; a plain word is a substring search.

    Returns:
        ``(trainable, total)``, counts of parameters (elements, not tensors).

    Raises:
        ValueError: for an invalid expression, and for one that matches no name (the message lists
            near ones); nothing is changed.
        TypeError: if a matching parameter is not floating point and so cannot train; nothing is changed.

    Example:
        >>> from torch import nn
        >>> from peft_ext.nn import LoRALinear, freeze_except
        >>> model = nn.Sequential(LoRALinear(nn.Linear(16, 16), rank=2), nn.Linear(16, 4))
        >>> freeze_except(model, r"lora_[AB]$")
        (64, 404)
        >>> freeze_except(model, [r"lora_[AB]$", r"^1\.bias$"])
        (68, 404)
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = {name for one in _patterns(pattern) for name in _matches(one, named)}
    for name in chosen:
        if not (named[name].is_floating_point() or named[name].is_complex()):
            raise TypeError(f"pattern {pattern!r} matches {name}, which cannot train: it is {named[name].dtype}")
    trained = {id(named[name]) for name in chosen}
    for parameter in named.values():
        parameter.requires_grad_(id(parameter) in trained)
    return trainable_parameters(model)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts ``(trainable, total)`` parameters (elements, not tensors); shared ones count once.

    Example:
        >>> from torch import nn
        >>> from peft_ext.nn import LoRALinear, trainable_parameters
        >>> trainable_parameters(LoRALinear(nn.Linear(768, 768), rank=8))
        (12288, 602880)
    """
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the counts of :func:`trainable_parameters` on one line, as Hugging Face PEFT does.

    Example:
        >>> from torch import nn
        >>> from peft_ext.nn import LoRALinear, print_trainable_parameters
        >>> print_trainable_parameters(LoRALinear(nn.Linear(768, 768), rank=8))
        trainable params: 12,288 || all params: 602,880 || trainable%: 2.0382
    """
    trainable, total = trainable_parameters(model)
    percent = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")


def _patterns(pattern: str | Sequence[str]) -> list[re.Pattern[str]]:
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("pattern must hold at least one regular expression, got an empty sequence")
    try:
        return [re.compile(one) for one in patterns]
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def _matches(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    found = [name for name in names if pattern.search(name)]
    if not found:
        near = ", ".join(_near(pattern.pattern, names)) or "none"
        raise ValueError(f"pattern {pattern.pattern!r} matches no parameter of the model, which has: {near}")
    return found


def _near(text: str, names: Iterable[str], count: int = 5) -> list[str]:
    """Up to ``count`` names that end much like ``text``, or the first ones if none does."""
    by_suffix = {name.split(".", depth)[-1]: name for name in names for depth in range(name.count(".") + 1)}
    close = difflib.get_close_matches(text, by_suffix, n=count)
    return list(dict.fromkeys(by_suffix[suffix] for suffix in close)) or list(names)[:count]
