"""/v1/models and /v1/adapters: what is served, added and removed while requests flow."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from serving import problems, replies
from serving.access import Admin, Caller, User
from serving.aliases import Aliases
from serving.chosen import may_ask
from serving.config import NAME
from serving.replica import Replica, check_path
from serving.rollout import Rollout
from serving.tuned_models import Tuned, TunedModels


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


def router(
    replica: Replica, *, root: Path, tuned: TunedModels | None, aliases: Aliases | None
) -> APIRouter:
    """The routes over a replica. root: where adapters that come over HTTP must lie."""
    service = replica.service
    routes = APIRouter()

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

    def own_aliases(caller: Caller) -> list[Rollout]:
        """The aliases that the caller may ask for; a model goes before an alias of its name."""
        rows = aliases.of(caller.project) if aliases else []
        return [one for one in rows if may_ask(caller, one) and one.name not in service.names()]

    def described_alias(one: Rollout) -> replies.ModelObject:
        return replies.alias_object(
            one.name,
            versions=one.versions,
            created=int(one.changed_at),
            owned_by=one.project,
        )

    @routes.get("/v1/models", response_model=replies.ModelList)
    async def list_models(caller: User) -> Any:
        """All models that the key may use, and what stands for them."""
        rows = [described(name) for name in own_names() if caller.may_use(name)]
        if tuned is not None:
            found = await tuned.list_(caller)
            rows += [described_tuned(model) for model in found if caller.may_use(model.name)]
        rows += map(described_alias, own_aliases(caller))
        return {"object": "list", "data": rows}

    @routes.get("/v1/models/{model:path}", response_model=replies.ModelObject)
    async def retrieve_model(model: str, caller: User) -> Any:
        """One model, or what stands for some."""
        if caller.may_use(model) and model in own_names():
            return described(model)
        one = next((one for one in own_aliases(caller) if one.name == model), None)
        if one is not None:
            return described_alias(one)
        found = await tuned.find(caller, model) if tuned and caller.may_use(model) else None
        if found is None:
            raise problems.model_not_found(model)
        return described_tuned(found)

    @routes.delete("/v1/models/{model:path}", response_model=replies.ModelDeleted)
    async def delete_model(model: str, caller: User) -> Any:
        """Serve a model no more; its files stay. One that was tuned: by its project."""
        if aliases is not None and caller.scopes & {"tune", "admin"}:
            if any(one.name == model for one in own_aliases(caller)):
                raise problems.invalid(
                    "model", f"{model!r} is an alias; its owner removes it: loray alias remove"
                )
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

    @routes.post("/v1/adapters", response_model=replies.ModelObject)
    async def add_adapter(body: AdapterRequest, caller: Admin) -> Any:
        """Serve an adapter under a name, in place of what had the name."""
        if aliases is not None:
            await asyncio.to_thread(aliases.book.require_free, body.name)
        await replica.add(body.name, check_path(root, body.path), body.mode)
        return described(body.name)

    @routes.post("/v1/adapters/{name:path}/mode", response_model=replies.ModelObject)
    async def switch_mode(name: str, body: ModeRequest, caller: Admin) -> Any:
        """Serve an adapter live or merged from now on."""
        if name not in replica.registry.entries():
            raise problems.model_not_found(name)
        await replica.switch(name, body.mode)
        return described(name)

    @routes.get("/v1/adapters")
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

    return routes
