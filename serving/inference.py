"""The routes: models, chat, completions, adapters, health and metrics."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cluster import __version__
from serving import problems, replies
from serving.access import Access, Admin, Caller, Gate, Infer, User
from serving.answering import Answering
from serving.config import NAME
from serving.grammar import Grammars
from serving.metrics import Metrics
from serving.quotas import Quotas
from serving.replica import Replica, check_path
from serving.schema import ChatRequest, CompletionRequest
from serving.service import Served


def resolve(caller: Caller, name: str) -> str:
    """The name of what is served for a name that a caller gives. Raises ApiError (404)."""
    if not caller.may_use(name):
        raise problems.model_not_found(name)
    return name


class AdapterRequest(BaseModel):
    """The body of POST /v1/adapters."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Relative to the server's adapter root."""
    mode: Literal["live", "merged"] = "live"


class ModeRequest(BaseModel):
    """The body of POST /v1/adapters/{name}/mode."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    mode: Literal["live", "merged"]


def make_app(
    replica: Replica,
    *,
    root: Path,
    access: Access,
    quotas: Quotas,
    metrics: Metrics,
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> FastAPI:
    """The application over a replica. root: where adapters that come over HTTP must lie."""
    service = replica.service
    app = FastAPI(
        title="LoRay",
        version=__version__,
        responses=problems.RESPONSES,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install(
        app,
        max_body_bytes=replica.recipe.http.max_body_bytes,
        gate=lambda inner: Gate(inner, access),
    )
    answering = Answering(
        service=service,
        grammars=_Tokenizers(),
        on_first=metrics.first_token,
        on_end=metrics.tokens,
        on_spent=quotas.spend,
    )

    app.state.access = access

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion)
    async def chat(body: ChatRequest, request: Request, caller: Infer) -> Response:
        """Answer a conversation."""
        with metrics.request("chat", body.model):
            quotas.take(caller)
            resolve(caller, body.model)
            response = await answering.chat(body, request, key=caller.key_id)
            response.headers.update(quotas.headers(caller))
            return response

    @app.post("/v1/completions", response_model=replies.TextCompletion)
    async def complete(body: CompletionRequest, request: Request, caller: Infer) -> Response:
        """Continue texts."""
        with metrics.request("completions", body.model):
            quotas.take(caller)
            resolve(caller, body.model)
            response = await answering.complete(body, request, key=caller.key_id)
            response.headers.update(quotas.headers(caller))
            return response

    def described(name: str) -> replies.ModelObject:
        fixed = service.fixed.get(name)
        owner = "loray"
        if fixed is not None:
            whole = replies.base_object(name, created=fixed.created, owned_by=owner)
            return whole if fixed.parent is None else {**whole, "parent": fixed.parent}
        entry = replica.registry.entries().get(name)
        loaded = service.adapters.loaded.get(name)
        if entry is None:
            raise problems.model_not_found(name)
        return replies.adapter_object(
            name,
            base=service.base.name,
            rank=loaded.rank if loaded else 0,
            created=entry.created,
            owned_by=owner,
        )

    @app.get("/v1/models", response_model=replies.ModelList)
    async def list_models(caller: User) -> Any:
        """All models that the caller may use."""
        names = [name for name in service.names() if caller.may_use(name)]
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{model:path}", response_model=replies.ModelObject)
    async def retrieve_model(model: str, caller: User) -> Any:
        """One model."""
        if model not in service.names() or not caller.may_use(model):
            raise problems.model_not_found(model)
        return described(model)

    @app.delete("/v1/models/{model:path}", response_model=replies.ModelDeleted)
    async def delete_model(model: str, caller: Admin) -> Any:
        """Serve an adapter no more; its files stay."""
        if model == service.base.name:
            raise problems.forbidden("The base model cannot be deleted.", param="model")
        if not await replica.remove(model):
            raise problems.model_not_found(model)
        return {"id": model, "object": "model", "deleted": True}

    @app.post("/v1/adapters", response_model=replies.ModelObject)
    async def add_adapter(body: AdapterRequest, caller: Admin) -> Any:
        """Serve an adapter under a name, in place of what had the name."""
        await replica.add(body.name, check_path(root, body.path), body.mode)
        return described(body.name)

    @app.post("/v1/adapters/{name:path}/mode", response_model=replies.ModelObject)
    async def switch_mode(name: str, body: ModeRequest, caller: Admin) -> Any:
        """Serve an adapter live or merged from now on."""
        if name not in replica.registry.entries():
            raise problems.model_not_found(name)
        await replica.switch(name, body.mode)
        return described(name)

    @app.get("/v1/adapters")
    async def list_adapters(caller: Admin) -> dict[str, Any]:
        """What is to be served, what is in memory, and what was refused."""
        loaded = service.adapters.loaded
        return {
            "object": "list",
            "data": [
                {
                    "name": name,
                    "path": entry.path,
                    "mode": replica.done.get(name, (0, entry.mode))[1],
                    "is_loaded": name in loaded or name in service.fixed,
                    "error": replica.failed.get(name, (0, None))[1],
                }
                for name, entry in replica.registry.entries().items()
            ],
        }

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 while every engine lives."""
        if not service.is_healthy():
            raise problems.overloaded(1)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def render_metrics(caller: Admin) -> Response:
        """For Prometheus, of all projects."""
        metrics.observe(service)
        body, content_type = metrics.render()
        return Response(body, media_type=content_type)

    return app


@asynccontextmanager
async def following(replica: Replica, access: Access, quotas: Quotas) -> AsyncIterator[None]:
    """Bring a replica to its registry, and keep it, its keys and its counts there in the block."""
    await replica.reconcile()
    tasks = [asyncio.create_task(one.follow()) for one in (replica, access)]
    counting = asyncio.create_task(quotas.follow())
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        quotas.end()
        await counting


class _Tokenizers:
    """The grammars of each tokenizer, made when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[int, Grammars] = {}
        self._lock = threading.Lock()

    def __call__(self, served: Served) -> Grammars:
        with self._lock:
            grammars = self._made.get(id(served.tokenizer))
            if grammars is None:
                vocab_size = served.engine.vocab_size
                grammars = Grammars(
                    served.tokenizer, vocab_size=vocab_size, stop_ids=served.encoder.stop_ids
                )
                self._made[id(served.tokenizer)] = grammars
            return grammars
