"""Live models of Hugging Face PEFT on our ops. peft is imported only when it is needed."""

from __future__ import annotations

import importlib.util

from torch import nn

from peft_ext.acceleration.report import Acceleration

__all__ = ["Acceleration", "accelerate", "restore"]


def accelerate(model: nn.Module) -> Acceleration:
    """Runs the layers of a live Hugging Face ``PeftModel`` on our ops.

    The model keeps its objects, parameters, state dict and checkpoints: layers only change their class, to a
    subclass of PEFT's with another forward. Merging, switching, adding and deleting adapters stay PEFT's code.
    Adapters that are added later are accelerated too. What the ops do not compute (see ``docs/accelerate.md``) runs
    PEFT's own forward: layers that never are served are listed in what is returned, and so is why.

    Served are LoRA around ``nn.Linear`` and ``Conv1D`` (with dropout, rsLoRA, DoRA, trained biases, several active
    adapters, mixed batches), LoKr around ``nn.Linear``, and prefix tuning of BERT-, GPT-2- and Llama-like models.

    Outputs and gradients are PEFT's up to rounding: the low-rank branch is summed in float32 and rounded once. LoRA's
    dropout drops with the same probability, but other elements than PEFT under the same manual seed.

    Args:
        model: a ``PeftModel`` or ``PeftMixedModel``, or any model with layers of PEFT's in it. Changed in place.
            To accelerate it again is harmless, and serves what could not be served before.

    Raises:
        TypeError: for a model without PEFT.

    Example:
        >>> import peft, torch, peft_ext
        >>> config = peft.LoraConfig(r=2, target_modules=["0", "1"])
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), config)
        >>> peft_ext.accelerate(model)
        Acceleration: 2 layers on lora_linear, 0 left
    """
    check_peft_model("accelerate", model)
    from peft_ext.acceleration import lokr, lora, prefix  # noqa: F401
    from peft_ext.acceleration.layers import accelerate_layers

    report = accelerate_layers(model)
    prefix.accelerate_prompts(model, report)
    return report


def restore(model: nn.Module) -> None:
    """Undoes :func:`accelerate`: all objects have PEFT's classes again, for instance to pickle or export them.

    Args:
        model: what :func:`accelerate` takes. One that is not accelerated stays as it is.

    Raises:
        TypeError: for a model without PEFT.

    Example:
        >>> import peft, torch, peft_ext
        >>> config = peft.LoraConfig(r=2, target_modules=["0"])
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
        >>> report = peft_ext.accelerate(model)
        >>> peft_ext.restore(model)
        >>> type(model.base_model.model[0]).__module__
        'peft.tuners.lora.layer'
    """
    check_peft_model("restore", model)
    from peft_ext.acceleration import lokr, lora, prefix  # noqa: F401
    from peft_ext.acceleration.layers import restore_layers

    restore_layers(model)
    prefix.restore_prompts(model)


def check_peft_model(name: str, model: object) -> None:
    """Raises a TypeError for what is no model of Hugging Face PEFT's."""
    if not _is_peft_model(model):
        raise TypeError(
            f"{name}() takes a model of Hugging Face PEFT (get_peft_model, PeftModel.from_pretrained), "
            f"got {type(model).__module__}.{type(model).__name__}"
        )


def _is_peft_model(model: object) -> bool:
    if not isinstance(model, nn.Module) or importlib.util.find_spec("peft") is None:
        return False
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, PeftModel | PeftMixedModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules())
