"""The routes: models, chat, completions, adapters, health and metrics."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cluster import __version__
from serving import alias_routes, files, finetuning, model_routes, problems, replies
from serving.access import Access, Admin, Caller, Gate, Infer
from serving.alias_book import TUNED
from serving.aliases import Aliases
from serving.answering import Answering
from serving.chosen import Chosen, choose
from serving.grammar import Grammars
from serving.job_book import JobBook
from serving.metrics import Metrics
from serving.quotas import Quotas
from serving.replica import Replica
from serving.schema import ChatRequest, CompletionRequest
from serving.service import Served
from serving.shadow import Shadows
from serving.shelf import Shelf
from serving.tuned_models import TunedModels


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What a replica needs for the files and the fine-tuning API."""

    shelf: Shelf
    book: JobBook
    models: TunedModels
    organization: str


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

    async def resolve(
        caller: Caller, body: ChatRequest | CompletionRequest, request: Request
    ) -> Chosen:
        """What is to answer a request. Raises ApiError (404)."""
        name = body.model
        if aliases is not None and shadows is not None and name not in service.names():
            alias = aliases.find(caller.project, name)
            if alias is None and not name.startswith(TUNED):
                alias = await aliases.find_new(caller.project, name)
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

    async def respond(
        body: ChatRequest | CompletionRequest, request: Request, caller: Caller
    ) -> Response:
        quotas.take(caller)
        chosen = await resolve(caller, body, request)
        response = await chosen.answer(
            answering, request, key=caller.key_id, ready=partial(ready, caller)
        )
        response.headers.update(quotas.headers(caller))
        return response

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion)
    async def chat(body: ChatRequest, request: Request, caller: Infer) -> Response:
        """Answer a conversation."""
        with metrics.request("chat", body.model):
            return await respond(body, request, caller)

    @app.post("/v1/completions", response_model=replies.TextCompletion)
    async def complete(body: CompletionRequest, request: Request, caller: Infer) -> Response:
        """Continue texts."""
        with metrics.request("completions", body.model):
            return await respond(body, request, caller)

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

    app.include_router(model_routes.router(replica, root=root, tuned=tuned, aliases=aliases))
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
