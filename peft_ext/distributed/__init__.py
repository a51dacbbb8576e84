"""Adapted models over several processes, on ``torch.distributed``.

DDP and FSDP2 (``fully_shard``) take an adapted model as it is. For tensor parallelism this package has the styles that
``parallelize_module`` gives to layers; importing it also tells DTensor how the ops are sharded.
"""

from peft_ext.distributed import sharding as sharding
from peft_ext.distributed.parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel"]
