"""What AdapterHub's methods are in this library, and the other way round, by the keys of the checkpoints."""

from peft_ext.tuners.adapterhub.layouts import BaseModel, Report
from peft_ext.tuners.adapterhub.reading import Converted, from_adapterhub

__all__ = ["BaseModel", "Converted", "Report", "from_adapterhub"]
