"""/v1/aliases: names that stand for versions, each with its share of the users."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from cluster.registry.tables import AliasChange
from serving import problems
from serving.access import Admin
from serving.aliases import Aliases
from serving.config import NAME
from serving.rollout import (
    MAX_METRIC_CHARS,
    MAX_TARGETS,
    MAX_WEIGHT,
    Count,
    Evaluation,
    Guard,
    Rollout,
    Target,
)

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_Metric: TypeAlias = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._:/@-]+$", max_length=MAX_METRIC_CHARS)
]


class TargetRequest(BaseModel):
    """A version, as a client names it."""

    model_config = _STRICT

    model: Annotated[str, Field(min_length=1, max_length=512)]
    weight: Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)] = 0.0
    is_shadow: bool = False


class EvaluationRequest(BaseModel):
    """A figure by which to go back."""

    model_config = _STRICT

    metric: _Metric
    better: Literal["higher", "lower"]
    max_fall: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class GuardRequest(BaseModel):
    """When to go back: for too many errors, for a score that is too low, or for either."""

    model_config = _STRICT

    error_rate: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    min_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    evaluation: EvaluationRequest | None = None

    def guard(self) -> Guard:
        """As the book has it. Raises ConfigError where it guards nothing."""
        evaluation = self.evaluation and Evaluation(**self.evaluation.model_dump())
        return Guard(
            error_rate=self.error_rate, min_requests=self.min_requests, evaluation=evaluation
        )


class AliasRequest(BaseModel):
    """The body of POST /v1/aliases."""

    model_config = _STRICT

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    targets: Annotated[list[TargetRequest], Field(min_length=1, max_length=MAX_TARGETS)]
    guard: GuardRequest | None = None


class RollbackRequest(BaseModel):
    """The body of POST /v1/aliases/{name}/rollback."""

    model_config = _STRICT

    # PostgreSQL takes no NUL.
    reason: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00]*$")] = (
        "by command"
    )
    revision: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Go back only where the alias is still at it."""


class ScoreRequest(BaseModel):
    """The body of POST /v1/aliases/{name}/scores."""

    model_config = _STRICT

    model: Annotated[str, Field(min_length=1, max_length=512)]
    metric: _Metric
    value: Annotated[float, Field(allow_inf_nan=False)]


class TargetObject(TypedDict):
    """A version, what became of its requests in the last minute, and its score by the guard's
    evaluation."""

    model: str
    weight: float
    is_shadow: bool
    requests: int | None
    errors: int | None
    mean_seconds: float | None
    score: float | None


class ChangeObject(TypedDict):
    """A line of an alias's history."""

    revision: int
    restored: int | None
    targets: list[Any]
    guard: dict[str, Any] | None
    reason: str
    by: str
    created_at: int


class AliasObject(TypedDict):
    """An alias."""

    id: str
    object: Literal["alias"]
    revision: int
    targets: list[TargetObject]
    guard: dict[str, Any] | None
    changes: list[ChangeObject] | None
    """The newest first; null in a list."""


class AliasList(TypedDict):
    """The aliases of a project."""

    object: Literal["list"]
    data: list[AliasObject]


class AliasDeleted(TypedDict):
    """What a removal answers."""

    id: str
    object: Literal["alias"]
    deleted: bool


def router(aliases: Aliases | None) -> APIRouter:
    """The routes. aliases: None on a server without a registry; the routes then answer 404."""
    routes = APIRouter(prefix="/v1/aliases")

    def opened() -> Aliases:
        if aliases is None:
            raise problems.ApiError("This server has no registry of aliases.", status=404)
        return aliases

    @routes.post("", response_model=AliasObject)
    async def set_alias(body: AliasRequest, caller: Admin) -> Any:
        """Have a name stand for versions from now on, in place of what it stood for."""
        targets = [Target(**target.model_dump()) for target in body.targets]
        guard = body.guard.guard() if body.guard else None
        done = await opened().put(
            caller.project, body.name, targets, guard, by=caller.key_id or "nobody"
        )
        return described(done)

    @routes.get("", response_model=AliasList)
    async def list_aliases(caller: Admin) -> Any:
        """Your project's aliases."""
        rows = await asyncio.to_thread(opened().book.list_, caller.project)
        return {"object": "list", "data": [described(row) for row in rows]}

    @routes.get("/{name:path}", response_model=AliasObject)
    async def retrieve_alias(name: str, caller: Admin) -> Any:
        """One alias, how its versions do, and what it stood for before."""
        book = opened().book
        one = await asyncio.to_thread(book.get, caller.project, name)
        counts = await asyncio.to_thread(book.last_minute, one)
        scores = await asyncio.to_thread(book.scores, one)
        changes = await asyncio.to_thread(book.changes, caller.project, name)
        return described(one, counts, scores, changes)

    @routes.post("/{name:path}/rollback", response_model=AliasObject)
    async def roll_back(name: str, body: RollbackRequest, caller: Admin) -> Any:
        """Restore what an alias stood for before its last change; again: before that."""
        done = await opened().rollback(
            caller.project,
            name,
            by=caller.key_id or "nobody",
            reason=body.reason,
            revision=body.revision,
        )
        if done is None:
            message = f"The alias is not at revision {body.revision} any more; look at it again."
            raise problems.ApiError(message, status=409, code="conflict", param="revision")
        return described(done)

    @routes.post("/{name:path}/scores", response_model=AliasObject)
    async def score_version(name: str, body: ScoreRequest, caller: Admin) -> Any:
        """Tell what a model is worth by the guard's evaluation; the alias goes back where that is
        too little."""
        aliases = opened()
        one = await aliases.score(
            caller.project,
            name,
            body.model,
            body.metric,
            body.value,
            by=caller.key_id or "nobody",
        )
        return described(one, scores=await asyncio.to_thread(aliases.book.scores, one))

    @routes.delete("/{name:path}", response_model=AliasDeleted)
    async def remove_alias(name: str, caller: Admin) -> Any:
        """Have a name stand for nothing. The models stay."""
        await opened().remove(caller.project, name, by=caller.key_id or "nobody")
        return {"id": name, "object": "alias", "deleted": True}

    return routes


def described(
    one: Rollout,
    counts: dict[str, Count] | None = None,
    scores: dict[str, float] | None = None,
    changes: list[AliasChange] | None = None,
) -> AliasObject:
    """As clients see it; counts: of the last minute."""
    return {
        "id": one.name,
        "object": "alias",
        "revision": one.revision,
        "targets": [_target(target, counts, scores or {}) for target in one.targets],
        "guard": asdict(one.guard) if one.guard else None,
        "changes": None if changes is None else [_change(change) for change in changes],
    }


def _target(
    target: Target, counts: dict[str, Count] | None, scores: dict[str, float]
) -> TargetObject:
    count = None if counts is None else counts.get(target.model, Count())
    has_answers = count is not None and count.requests > 0
    return {
        "model": target.model,
        "weight": target.weight,
        "is_shadow": target.is_shadow,
        "requests": count and count.requests,
        "errors": count and count.errors,
        "mean_seconds": count.seconds / count.requests if count and has_answers else None,
        "score": scores.get(target.model),
    }


def _change(change: AliasChange) -> ChangeObject:
    return {
        "revision": change.revision,
        "restored": change.restored,
        "targets": change.targets,
        "guard": change.guard,
        "reason": change.reason,
        "by": change.by,
        "created_at": int(change.created_at),
    }
