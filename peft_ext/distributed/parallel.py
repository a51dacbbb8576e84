"""torch's tensor-parallel styles, for layers with LoRA too.

``lora_B`` and the base layer are sharded by column, or ``lora_A`` and the base layer by row; the other factor is
everywhere. Only the activations that torch's styles send are sent, and the gradient of that factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from peft_ext.nn.lora import LoRALinear
from peft_ext.tuners.lora_layers import LoraLinear
from peft_ext.tuners.targets import is_conv1d


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """``torch.distributed.tensor.parallel.ColwiseParallel``, also for :class:`LoRALinear` and layers of ``LoraConfig``.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from peft_ext.distributed import ColwiseParallel, RowwiseParallel
        >>> plan = {"layers.*.self_attn.q_proj": ColwiseParallel(), "layers.*.self_attn.o_proj": RowwiseParallel()}
        >>> # parallelize_module(model, init_device_mesh("cuda", (8,)), plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear | LoraLinear):
            return super()._apply(module, device_mesh)
        return _shard(self, module, device_mesh, {"weight": 0, "weight_scale": 0, "bias": 0}, "lora_B", Replicate())


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """``torch.distributed.tensor.parallel.RowwiseParallel``, also for :class:`LoRALinear` and layers of ``LoraConfig``.

    A quantized base layer can only be sharded by column.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear | LoraLinear):
            return super()._apply(module, device_mesh)
        return _shard(self, module, device_mesh, {"weight": 1}, "lora_A", Shard(-1))


def _shard(
    style: Any, layer: nn.Module, mesh: DeviceMesh, base_dims: Mapping[str, int], factor: str, wanted: Placement
) -> nn.Module:
    """Shards a layer's base by ``base_dims`` and one factor along with it; ``wanted``: where the input is to lie."""

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        place = name.split(".")[0]
        for key, parameter in list(module.named_parameters(recurse=False)):
            dim = base_dims.get(key) if place in ("linear", "base_layer") else None
            if dim is not None and key == "weight" and is_conv1d(module):
                dim = 1 - dim
            if factor in (place, key):
                dim = base_dims["weight"]
            placement = Replicate() if dim is None else Shard(dim)
            value = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=style.src_data_rank)
            module.register_parameter(key, nn.Parameter(value, requires_grad=parameter.requires_grad))

    # the hooks return what replaces input and output; torch's annotations have them return nothing
    before: Any = partial(_prepare_input, style, wanted)
    after: Any = partial(_prepare_output, style)
    return distribute_module(layer, mesh, partition, before, after)


def _prepare_input(style: Any, wanted: Placement, layer: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
    return x.redistribute(placements=[wanted])


def _prepare_output(style: Any, layer: nn.Module, y: DTensor, mesh: DeviceMesh) -> Tensor:
    y = y.redistribute(placements=style.output_layouts)
    return y.to_local() if style.use_local_output else y
