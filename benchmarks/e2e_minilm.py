"""e2e_minilm: a training step of MiniLM as a classifier of sequences, with LoRA of query and value, in every library.

The yardstick, which is the floor too, is the frozen model and its backward to the input embeddings. The step of the
others is forward, loss, backward and AdamW on LoRA (r = 8) and on the classifier.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import whole_model
from model_tasks import HEAD, ModelShape, classification_loss, prepare_classifier
from registry import STEP, Benchmark, Dtypes, Tensors
from whole_model import WholeModel

from peft_ext.cli.demo import MODEL_PACKAGE, find_model

FEATURES, CLASSES = 384, 2


def load() -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # the classifier is new
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForSequenceClassification.from_pretrained(find_model(), dtype="float32")


WHOLE = WholeModel(
    "minilm", cache(load), classification_loss, "SEQ_CLS", ("query", "value"), find_model, prepare_classifier
)


def make_tensors(shape: ModelShape, dtypes: Dtypes) -> Tensors:
    return {
        "embeds": torch.randn(shape.batch, shape.length, FEATURES, dtype=dtypes.base),
        "labels": torch.arange(shape.batch) % CLASSES,
        f"{HEAD} weight": torch.randn(CLASSES, FEATURES).to(dtypes.base) * 0.02,
        f"{HEAD} bias": torch.zeros(CLASSES, dtype=dtypes.base),
        **whole_model.factor_tensors(WHOLE.source(), WHOLE.targets, shape.names, dtypes),
    }


SHAPE = ModelShape(32, 48)
DEFAULT = (SHAPE, replace(SHAPE, dropout=0.1), replace(SHAPE, dropout=0.1, model_dropout=0.1))

BENCHMARK = Benchmark(
    op="e2e_minilm",
    passes=(STEP,),
    shape_type=ModelShape,
    shapes={"default": DEFAULT, "quick": (ModelShape(4, 16),)},
    make_tensors=make_tensors,
    implementations=whole_model.implementations(WHOLE, MODEL_PACKAGE),
    floor=whole_model.floor,
    target=whole_model.target,
    peak_target=whole_model.peak_target,
    most_seconds=120.0,
    rounding=50.0,  # a whole model amplifies what one layer rounds, more in some draws than in others
)
