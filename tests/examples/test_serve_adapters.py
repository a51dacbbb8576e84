"""The example of a server: fifty adapters in one model, mixed batches, adapters that come and go."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import shutil
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_ext import LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_adapters.py"
NAMES = [f"adapter-{index:02}" for index in range(50)]
PROMPTS = ("a", "the cat sat", "one two three", "zz top!")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_adapters", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Llama with its tokenizer, and the folder of fifty adapters of it, of two ranks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(root / "base")
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(root / "base")
    configs = [
        LoraConfig(task_type="CAUSAL_LM", r=2 + 2 * (index % 2), lora_alpha=16, init_lora_weights=False)
        for index in range(len(NAMES))
    ]
    model = get_peft_model(base, configs[0], NAMES[0])
    for name, lora in zip(NAMES[1:], configs[1:], strict=True):
        model.add_adapter(name, lora)
    model.save_pretrained(root / "adapters")
    return root / "base", root / "adapters"


@pytest.fixture
def folder(saved: tuple[Path, Path], tmp_path: Path) -> Path:
    """The adapters' folder, to be changed."""
    return Path(shutil.copytree(saved[1], tmp_path / "adapters"))


@pytest.fixture
def server(script: ModuleType, saved: tuple[Path, Path], folder: Path) -> Any:
    server = script.load(str(saved[0]), folder)
    server.plain = transformers.AutoModelForCausalLM.from_pretrained(saved[0]).eval()
    server.batches = []
    generate = server.generate

    def recorded(requests: list[Any]) -> list[str]:
        server.batches.append([request.adapter for request in requests])
        return generate(requests)

    server.generate = recorded
    return server


def serve(script: ModuleType, server: Any, folder: Path, visit: Callable[[Any], Awaitable[None]]) -> None:
    """Runs a visit, which gets a client, in the app's own event loop."""

    @asynccontextmanager
    async def client() -> Any:
        app = script.create_app(server, folder)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            yield http

    async def run() -> None:
        async with client() as http:
            await asyncio.wait_for(visit(http), timeout=120)

    asyncio.run(run())


def ask(http: Any, adapter: str, prompt: str, length: int = 6) -> Awaitable[Any]:
    return http.post("/generate", json={"adapter": adapter, "prompt": prompt, "max_new_tokens": length})


def alone(saved: tuple[Path, Path], server: Any, adapter: str, prompt: str, length: int = 6) -> str:
    """What the adapter generates in a model that has no other."""
    base = copy.deepcopy(server.plain)
    model = base if adapter == "__base__" else PeftModel.from_pretrained(base, saved[1] / adapter)
    inputs = server.tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)
    return server.tokenizer.decode(tokens[0, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def test_fifty_adapters_in_mixed_batches_answer_as_each_does_alone(
    script: ModuleType, server: Any, saved: tuple[Path, Path], folder: Path
) -> None:
    server.wait = 0.5  # long enough for all to come
    asked = [(name, PROMPTS[index % 4], 3 + index % 4) for index, name in enumerate(["__base__", *NAMES])]

    async def visit(http: Any) -> None:
        answers = await asyncio.gather(*(ask(http, *what) for what in asked))
        assert [answer.status_code for answer in answers] == [200] * len(asked)
        texts = [answer.json()["text"] for answer in answers]
        assert texts == [alone(saved, server, *what) for what in asked]
        assert len(set(texts)) > 25, "the adapters have to differ for this to say anything"

    serve(script, server, folder, visit)
    assert [len(batch) for batch in server.batches] == [32, 19]


def test_adapters_come_and_go(script: ModuleType, server: Any, saved: tuple[Path, Path], folder: Path) -> None:
    first, second = NAMES[:2]

    async def visit(http: Any) -> None:
        assert (await http.get("/adapters")).json() == NAMES
        assert (await http.delete(f"/adapters/{first}")).status_code == 200
        assert (await ask(http, first, "a")).status_code == 404
        assert (await http.delete(f"/adapters/{first}")).status_code == 404
        assert (await http.put(f"/adapters/{first}")).status_code == 200
        assert (await ask(http, first, "a")).json()["text"] == alone(saved, server, first, "a")
        # new files under the old name
        shutil.copytree(folder / NAMES[3], folder / second, dirs_exist_ok=True)
        assert (await http.put(f"/adapters/{second}")).status_code == 200
        assert (await ask(http, second, "a")).json()["text"] == alone(saved, server, NAMES[3], "a")

    serve(script, server, folder, visit)


def test_what_cannot_be_served_is_an_error_and_the_others_go_on(
    script: ModuleType, server: Any, saved: tuple[Path, Path], folder: Path
) -> None:
    (folder / NAMES[0] / "adapter_model.safetensors").write_bytes(b"no tensors")

    async def visit(http: Any) -> None:
        assert (await http.put(f"/adapters/{NAMES[0]}")).status_code == 422
        assert (await http.put("/adapters/missing")).status_code == 404
        assert (await http.put("/adapters/..%2Fbase")).status_code in (404, 422)
        assert (await ask(http, "missing", "a")).status_code == 404
        assert (await ask(http, NAMES[0], "")).status_code == 422
        # removed while a request for it waits
        waiting = asyncio.gather(ask(http, NAMES[1], "a"), ask(http, NAMES[2], "a"))
        while server.queue.empty():
            await asyncio.sleep(0)
        async with server.lock:
            server.model.delete_adapter(NAMES[1])
        gone, there = await waiting
        assert (gone.status_code, there.status_code) == (404, 200)
        assert there.json()["text"] == alone(saved, server, NAMES[2], "a")
        server.generate = lambda requests: 1 / 0
        assert (await ask(http, NAMES[2], "a")).status_code == 500
        del server.generate
        assert (await ask(http, NAMES[2], "a")).status_code == 200

    server.wait = 0.05
    serve(script, server, folder, visit)


def test_requests_that_are_given_up_leave_the_server_running(script: ModuleType, server: Any, folder: Path) -> None:
    async def visit(http: Any) -> None:
        given_up = asyncio.create_task(server.ask(script.Request(prompt="a", adapter=NAMES[0])))
        while server.queue.empty():
            await asyncio.sleep(0)
        given_up.cancel()
        answers = await asyncio.wait_for(asyncio.gather(ask(http, NAMES[1], "a"), ask(http, NAMES[2], "a")), 30)
        assert [answer.status_code for answer in answers] == [200, 200]
        again = await asyncio.wait_for(ask(http, NAMES[3], "a"), 30)
        assert again.status_code == 200

    server.wait = 0.05
    serve(script, server, folder, visit)


def test_clients_that_go_before_their_answer_leave_the_server_at_work(
    script: ModuleType, server: Any, folder: Path
) -> None:
    generate, server.wait = server.generate, 0.0
    hasty: list[asyncio.Task[Any]] = []

    def leave_meanwhile(requests: list[Any]) -> list[str]:
        hasty[0].get_loop().call_soon_threadsafe(hasty[0].cancel)
        return generate(requests)

    async def visit(http: Any) -> None:
        server.generate = leave_meanwhile
        hasty.append(asyncio.create_task(ask(http, NAMES[0], "a")))
        await asyncio.wait(hasty)
        server.generate = generate
        answer = await asyncio.wait_for(ask(http, NAMES[1], "a"), timeout=30)
        assert hasty[0].cancelled() and answer.status_code == 200

    serve(script, server, folder, visit)
