"""``python -m peft_ext``: the same as ``peft-ext``."""

from peft_ext.cli import main

main()
