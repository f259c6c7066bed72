"""What answers a request: the model that it names, or a version of the alias that it names."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response

from serving import problems
from serving.access import Caller
from serving.aliases import fault_of
from serving.answering import Answering
from serving.problems import ApiError
from serving.rollout import Rollout
from serving.schema import ChatRequest, CompletionRequest
from serving.shadow import Shadows

HEADER = "x-loray-model"
"""Of answers: the version that an alias stood for."""
USER_HEADER = "x-loray-user"
"""Of requests: who asks, where the body has no `user`."""
_PLAIN = "/:._-+@ "
_MAX_USER_CHARS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A request, with the model that answers it."""

    body: ChatRequest | CompletionRequest
    """Its `model` is that model."""
    alias: Rollout | None = None
    """What was asked for, where that was an alias."""
    shadows: Shadows | None = None
    """Where copies for its shadow go."""
    clock: Callable[[], float] = time.perf_counter

    async def answer(
        self,
        answering: Answering,
        request: Request,
        *,
        key: str,
        ready: Callable[[str], Awaitable[None]],
    ) -> Response:
        """The answer, which says who gave it. ready: has a model ready to be asked, or raises."""
        if self.alias is None or self.shadows is None:
            await ready(self.body.model)
            return await answering.answer(self.body, request, key=key)
        alias, shadows, started = self.alias, self.shadows, self.clock()

        def on_outcome(error: Exception | None) -> None:
            is_fault = fault_of(error) if not _is_missing(error) else True
            if is_fault is None:
                return
            seconds = self.clock() - started
            shadows.aliases.count(alias, self.body.model, seconds=seconds, is_fault=is_fault)
            if alias.shadow is not None:
                shadows.start(alias, alias.shadow, self.body, ready)

        try:
            try:
                await ready(self.body.model)
            except ApiError as error:
                on_outcome(error)
                raise
            response = await answering.answer(self.body, request, key=key, on_outcome=on_outcome)
        except ApiError as error:
            if not _is_missing(error):
                raise
            raise ApiError(
                f"The alias `{alias.name}` stands for the model `{self.body.model[:200]}`, which "
                "is not served any more; its owner has to set or roll back the alias.",
                status=500,
                code="alias_broken",
                param="model",
            ) from None
        response.headers[HEADER] = quote(self.body.model, safe=_PLAIN)
        return response


def choose(
    alias: Rollout,
    caller: Caller,
    body: ChatRequest | CompletionRequest,
    request: Request,
    shadows: Shadows,
) -> Chosen:
    """The version that answers this caller's user. Raises ApiError (404) where he may not ask."""
    if not may_ask(caller, alias):
        raise problems.model_not_found(alias.name)
    user = body.user or request.headers.get(USER_HEADER, "")[:_MAX_USER_CHARS] or caller.key_id
    version = alias.choose(user)
    return Chosen(body=body.model_copy(update={"model": version}), alias=alias, shadows=shadows)


def may_ask(caller: Caller, alias: Rollout) -> bool:
    """Whether a key of the project names an alias, or may use all of its versions."""
    return caller.may_use(alias.name) or all(map(caller.may_use, alias.versions))


def _is_missing(error: Exception | None) -> bool:
    """Whether there is no such model: what clients ask for by an alias is not theirs to know."""
    return isinstance(error, ApiError) and error.code == "model_not_found"
