"""The routes: models, chat, completions, adapters, health and metrics."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from cluster import __version__
from serving import alias_routes, files, finetuning, problems, replies
from serving.access import Access, Admin, Caller, Gate, Infer, User
from serving.aliases import Aliases
from serving.answering import Answering
from serving.chosen import Chosen, choose
from serving.config import NAME
from serving.grammar import Grammars
from serving.job_book import JobBook
from serving.metrics import Metrics
from serving.quotas import Quotas
from serving.replica import Replica, check_path
from serving.schema import ChatRequest, CompletionRequest
from serving.service import Served
from serving.shadow import Shadows
from serving.shelf import Shelf
from serving.tuned_models import Tuned, TunedModels


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a replica needs for the files and the fine-tuning API."""

    shelf: Shelf
    book: JobBook
    models: TunedModels
    organization: str


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
    tuning: Tuning | None = None,
    aliases: Aliases | None = None,
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> FastAPI:
    """The application over a replica. root: where adapters that come over HTTP must lie."""
    service = replica.service
    tuned = tuning.models if tuning else None
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
        longer=files.body_limits(tuning.shelf.limits) if tuning else None,
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

    shadows = Shadows(answering=answering, aliases=aliases) if aliases else None

    def resolve(caller: Caller, body: ChatRequest | CompletionRequest, request: Request) -> Chosen:
        """What is to answer a request. Raises ApiError (404)."""
        name = body.model
        if aliases is not None and shadows is not None and name not in service.names():
            alias = aliases.find(caller.project, name)
            if alias is not None:
                return choose(alias, caller, body, request, shadows)
        if not caller.may_use(name):
            raise problems.model_not_found(name)
        return Chosen(body=body)

    async def ready(caller: Caller, name: str) -> None:
        """Have a model of the caller's be there. Raises ApiError (404)."""
        is_tuned = tuned is not None and (tuned.is_known(name) or name not in service.names())
        if tuned is not None and is_tuned and await tuned.find(caller, name) is None:
            raise problems.model_not_found(name)

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion)
    async def chat(body: ChatRequest, request: Request, caller: Infer) -> Response:
        """Answer a conversation."""
        with metrics.request("chat", body.model):
            quotas.take(caller)
            chosen = resolve(caller, body, request)
            response = await chosen.answer(
                answering, request, key=caller.key_id, ready=partial(ready, caller)
            )
            response.headers.update(quotas.headers(caller))
            return response

    @app.post("/v1/completions", response_model=replies.TextCompletion)
    async def complete(body: CompletionRequest, request: Request, caller: Infer) -> Response:
        """Continue texts."""
        with metrics.request("completions", body.model):
            quotas.take(caller)
            chosen = resolve(caller, body, request)
            response = await chosen.answer(
                answering, request, key=caller.key_id, ready=partial(ready, caller)
            )
            response.headers.update(quotas.headers(caller))
            return response

    def described(name: str) -> replies.ModelObject:
        fixed = service.fixed.get(name)
        owner = "loray"
        if fixed is not None:
            whole = replies.base_object(name, created=fixed.created, owned_by=owner)
            return whole if fixed.parent is None else {**whole, "parent": fixed.parent}
        entry = replica.registry.entries().get(name)
        if entry is None:
            raise problems.model_not_found(name)
        return replies.adapter_object(
            name,
            base=service.base.name,
            rank=rank_of(name),
            created=entry.created,
            owned_by=owner,
        )

    def rank_of(name: str) -> int:
        loaded = service.adapters.loaded.get(name)
        return loaded.rank if loaded else 0

    def described_tuned(model: Tuned) -> replies.ModelObject:
        return replies.adapter_object(
            model.name,
            base=model.base,
            rank=rank_of(model.name),
            created=model.created,
            owned_by=model.project,
        )

    def own_names() -> list[str]:
        """What is served to everybody: the base, and what the operator added."""
        return [n for n in service.names() if tuned is None or not tuned.is_known(n)]

    @app.get("/v1/models", response_model=replies.ModelList)
    async def list_models(caller: User) -> Any:
        """All models that the key may use."""
        rows = [described(name) for name in own_names() if caller.may_use(name)]
        if tuned is not None:
            found = await tuned.list_(caller)
            rows += [described_tuned(model) for model in found if caller.may_use(model.name)]
        return {"object": "list", "data": rows}

    @app.get("/v1/models/{model:path}", response_model=replies.ModelObject)
    async def retrieve_model(model: str, caller: User) -> Any:
        """One model."""
        if caller.may_use(model) and model in own_names():
            return described(model)
        found = await tuned.find(caller, model) if tuned and caller.may_use(model) else None
        if found is None:
            raise problems.model_not_found(model)
        return described_tuned(found)

    @app.delete("/v1/models/{model:path}", response_model=replies.ModelDeleted)
    async def delete_model(model: str, caller: User) -> Any:
        """Serve a model no more; its files stay. One that was tuned: by its project."""
        if aliases is not None and caller.scopes & {"tune", "admin"}:
            project = None if model in own_names() else caller.project
            await asyncio.to_thread(aliases.book.require_unused, model, project=project)
        is_deleted = False
        if tuned is not None and caller.scopes & {"tune", "admin"} and caller.may_use(model):
            is_deleted = await tuned.delete(caller, model)
        if not is_deleted:
            caller.require("admin")
            if model == service.base.name:
                raise problems.forbidden("The base model cannot be deleted.", param="model")
            if model not in own_names() or not await replica.remove(model):
                raise problems.model_not_found(model)
        return {"id": model, "object": "model", "deleted": True}

    @app.post("/v1/adapters", response_model=replies.ModelObject)
    async def add_adapter(body: AdapterRequest, caller: Admin) -> Any:
        """Serve an adapter under a name, in place of what had the name."""
        if aliases is not None:
            await asyncio.to_thread(aliases.book.require_free, body.name)
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

    app.include_router(alias_routes.router(aliases))
    app.include_router(files.router(tuning.shelf if tuning else None))
    app.include_router(
        finetuning.router(
            tuning.book if tuning else None,
            organization=tuning.organization if tuning else "",
        )
    )
    return app


@asynccontextmanager
async def following(
    replica: Replica,
    access: Access,
    quotas: Quotas,
    models: TunedModels | None = None,
    aliases: Aliases | None = None,
) -> AsyncIterator[None]:
    """Bring a replica to its registry, and keep it, its keys and its counts there in the block."""
    await replica.reconcile()
    followers = [replica.follow(), access.follow()]
    if aliases is not None:
        await aliases.step()
        followers.append(aliases.follow())
    if models is not None:
        followers.append(models.follow())
    tasks = [asyncio.create_task(follower) for follower in followers]
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
