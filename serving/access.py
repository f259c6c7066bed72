"""Who asks, and what he may: what a route's `User`, `Infer`, `Tune` or `Admin` parameter is."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from fastapi import Depends, Request

from serving import problems

Scope = Literal["infer", "tune", "admin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks."""

    key_id: str = ""
    """Empty where no key is asked."""
    project: str = "default"
    """Whose files, jobs and models it sees."""
    scopes: frozenset[Scope] = frozenset({"infer", "tune", "admin"})
    models: tuple[str, ...] | None = None
    """The models that it opens; null: all of its project."""
    concurrent_jobs: int | None = None

    def require(self, scope: Scope) -> None:
        """Raises ApiError (403). An admin may do everything."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise problems.forbidden(f"This API key does not have the scope {scope}.")

    def may_use(self, model: str) -> bool:
        """Whether it opens a model."""
        return self.models is None or model in self.models


def _user(request: Request) -> Caller:
    state = request.app.state
    if getattr(state, "access", None) is not None:
        return state.access.check(request.headers.get("authorization"))
    if getattr(state, "keys", None) is None:
        return Caller()
    key = state.keys.check(request.headers.get("authorization"))
    admin = frozenset[Scope]({"admin"} if "admin" in key.roles else {"infer"})
    return Caller(key_id=key.id, scopes=admin, models=key.models)


def _infer(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("infer")
    return caller


def _tune(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("tune")
    return caller


def _admin(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("admin")
    return caller


User: TypeAlias = Annotated[Caller, Depends(_user)]
Infer: TypeAlias = Annotated[Caller, Depends(_infer)]
Tune: TypeAlias = Annotated[Caller, Depends(_tune)]
Admin: TypeAlias = Annotated[Caller, Depends(_admin)]
