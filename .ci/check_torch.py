"""The environment holds a CPU torch of the version to build against by default, and the extension runs on it."""

import torch

from peft_ext._loader import describe

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
assert torch.version.cuda is None, f"a CUDA torch was installed: {torch.__version__}"
assert describe()["native"], describe()
print(f"torch {torch.__version__}; native extension: {describe()['build']}")
