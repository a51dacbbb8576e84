"""Serves one base model with many adapters: requests for different adapters share a forward.

pip install ".[train]" fastapi uvicorn
python examples/serve_adapters.py MODEL FOLDER      # every subfolder of FOLDER is an adapter

curl localhost:8000/generate --json '{"adapter": "news", "prompt": "Today", "max_new_tokens": 20}'
curl -X PUT localhost:8000/adapters/reviews         # loads FOLDER/reviews, or its new files
curl -X DELETE localhost:8000/adapters/reviews
"""

import argparse
import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_ext import PeftModel

BASE = "__base__"  # the name that stands for no adapter
Name = Annotated[str, PathParameter(pattern=r"^[\w-]+$")]


class Request(BaseModel):
    prompt: str = Field(min_length=1)
    adapter: str = BASE
    max_new_tokens: int = Field(20, ge=1, le=256)


class Server:
    """A model, and the requests that wait for it."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, max_batch: int = 32, wait: float = 0.005):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.wait = max_batch, wait
        self.queue: asyncio.Queue[tuple[Request, asyncio.Future[str]]] = asyncio.Queue()
        self.lock = asyncio.Lock()  # adapters come and go between batches, not within one

    def check(self, adapter: str) -> None:
        if adapter != BASE and adapter not in self.model.peft_config:
            raise HTTPException(404, f"there is no adapter {adapter!r}")

    async def ask(self, request: Request) -> str:
        self.check(request.adapter)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self.queue.put((request, answer))
        return await answer

    async def run(self) -> None:
        """Answers what is in the queue, a batch at a time, for ever."""
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(self.wait)  # others may come
            while len(batch) < self.max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            async with self.lock:
                await self.answer(batch)

    async def answer(self, batch: list[tuple[Request, "asyncio.Future[str]"]]) -> None:
        rows = []
        for request, answer in batch:
            if answer.done():  # the client has gone
                continue
            try:
                self.check(request.adapter)  # it may have gone since
                rows.append((request, answer))
            except HTTPException as error:
                answer.set_exception(error)
        try:
            texts = await asyncio.to_thread(self.generate, [request for request, _ in rows]) if rows else []
            for (_, answer), text in zip(rows, texts, strict=True):
                if not answer.done():
                    answer.set_result(text)
        except Exception as error:  # fails these requests, not the server
            for _, answer in rows:
                if not answer.done():
                    answer.set_exception(error)

    def generate(self, requests: list[Request]) -> list[str]:
        """One ``generate`` for all of them, a row each."""
        prompts = [request.prompt for request in requests]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.model.device)
        tokens = self.model.generate(
            **inputs,
            adapter_names=[request.adapter for request in requests],
            max_new_tokens=max(request.max_new_tokens for request in requests),
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].size(1) :]
        rows = [row[: request.max_new_tokens] for row, request in zip(new, requests, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def create_app(server: Server, folder: Path) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI):
        task = asyncio.create_task(server.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, str]:
        return {"text": await server.ask(request)}

    @app.get("/adapters")
    async def adapters() -> list[str]:
        return list(server.model.peft_config)

    @app.put("/adapters/{name}")
    async def add(name: Name) -> None:
        async with server.lock:
            try:
                await asyncio.to_thread(server.model.load_adapter, folder / name, name)
            except FileNotFoundError as error:
                raise HTTPException(404, str(error)) from error
            except (TypeError, ValueError) as error:  # damaged, or another base model's; the others serve on
                raise HTTPException(422, str(error)) from error

    @app.delete("/adapters/{name}")
    async def remove(name: Name) -> None:
        async with server.lock:
            server.check(name)
            server.model.delete_adapter(name)

    return app


def load(model_id: str, folder: Path) -> Server:
    """The base model with every adapter in the folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(model_id)
    first, *others = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    model = PeftModel.from_pretrained(base, first, adapter_name=first.name)
    for path in others:
        model.load_adapter(path, path.name)
    return Server(model, tokenizer)


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(create_app(load(options.model, options.folder), options.folder), port=options.port)
