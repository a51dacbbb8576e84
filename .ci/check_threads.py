"""An op of ours with two threads computes on two threads.

``at::parallel_for`` is a serial loop in an extension compiled without OpenMP, and nothing says so. Processor time per
thread is compared, not elapsed time, so that a busy machine does not matter. ``lora_merge_`` contains no GEMM, whose
threads would be counted here as ours. Run with OMP_WAIT_POLICY=passive: waiting threads must not count as working.
"""

import os
from pathlib import Path

import torch

from peft_ext.ops import lora_merge_

assert os.environ.get("OMP_WAIT_POLICY") == "passive", "run with OMP_WAIT_POLICY=passive"


def busy_ticks() -> dict[str, int]:
    """User-mode processor time of each thread of this process, in clock ticks."""
    stats = {task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()}
    return {thread: int(stat.rpartition(")")[2].split()[11]) for thread, stat in stats.items()}


torch.set_num_threads(2)
weight, lora_a, lora_b = torch.randn(2048, 2048), torch.randn(16, 2048), torch.randn(2048, 16)
before = busy_ticks()
for _ in range(100):
    lora_merge_(weight, lora_a, lora_b, 1e-3)
used = sorted((ticks - before.get(thread, 0) for thread, ticks in busy_ticks().items()), reverse=True)

print(f"clock ticks per thread: {used}")
assert used[0] >= 20, "too little work to tell"
assert used[1] >= used[0] / 2, "the second thread did less than half of the first one's work"
