"""A request's form, read into storage while it comes in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import cast, get_args

from starlette.requests import ClientDisconnect

from cluster.registry.tables import File
from serving import incoming, problems
from serving.access import Caller
from serving.incoming import Incoming
from serving.multipart import Event, Field, FileStart, Form
from serving.problems import ApiError
from serving.shelf import Label, Purpose, Shelf, plain_filename

RESULTS = "fine-tune-results"
PURPOSES = tuple(purpose for purpose in get_args(Purpose) if purpose != RESULTS)
"""Those of clients."""
LIFETIME_S = (3600, 2592000)
"""Least and most of `expires_after[seconds]`."""
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_PIECE_BYTES = 256 << 10
"""What is written at once."""
_SILENCE_S = 60.0
"""How long a client may send nothing."""
_UPLOAD_S = 7200.0
"""How long it may take over all."""


async def receive(
    shelf: Shelf,
    chunks: AsyncIterator[bytes],
    *,
    caller: Caller,
    content_type: str,
    expected_bytes: int,
    silence_s: float = _SILENCE_S,
) -> File:
    """Store the file of a form. Raises ApiError: then nothing of it is left.

    chunks: the request's body. expected_bytes: of it, where the client says so, else 0.
    """
    form = Form(content_type)
    upload = await _open(shelf, caller.project, expected_bytes)
    draft = _Draft(upload, shelf.limits.max_line_bytes)
    try:
        async with asyncio.timeout(_UPLOAD_S):
            async for chunk in _lively(chunks, silence_s):
                for event in form.feed(chunk):
                    await draft.take(event)
        form.finish()
        label = await draft.finish(caller)
    except TimeoutError:
        upload.close()
        raise ApiError("The upload took too long; nothing was kept.", status=408) from None
    except ClientDisconnect:  # nobody hears it
        upload.close()
        raise ApiError("The upload broke off; nothing was kept.", status=400) from None
    except BaseException:
        upload.close()
        raise
    # From here on the file may become one, so that its writer is closed by what makes it one.
    keeping = asyncio.create_task(asyncio.to_thread(shelf.keep, upload, label))
    keeping.add_done_callback(lambda _: upload.close())
    return await asyncio.shield(keeping)


async def _open(shelf: Shelf, project: str, expected_bytes: int) -> Incoming:
    opening = asyncio.create_task(
        asyncio.to_thread(shelf.receive, project, expected_bytes=expected_bytes)
    )
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:  # the client has gone, and the thread opens it all the same
        opening.add_done_callback(_close)
        raise


def _close(opening: "asyncio.Task[Incoming]") -> None:
    with suppress(Exception, asyncio.CancelledError):
        opening.result().close()


async def _lively(chunks: AsyncIterator[bytes], silence_s: float) -> AsyncIterator[bytes]:
    """The same, as long as they keep coming. Raises TimeoutError."""
    while True:
        async with asyncio.timeout(silence_s):
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
        yield chunk


class _Draft:
    """What is known of a file so far."""

    def __init__(self, upload: Incoming, max_line_bytes: int) -> None:
        self._upload = upload
        self._max_line_bytes = max_line_bytes
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._buffer = bytearray()

    async def take(self, event: Event) -> None:
        """Raises ApiError for what cannot be."""
        if isinstance(event, bytes):
            self._buffer += event
            if len(self._buffer) >= _PIECE_BYTES:
                await self._write()
            return
        if isinstance(event, FileStart):
            self._filename = plain_filename(event.filename)
            if not self._filename:
                raise problems.invalid("file", "it has no name; give one")
        else:
            self._keep(event)
        self._require_training_data()

    async def finish(self, caller: Caller) -> Label:
        """The form is whole."""
        await self._write()
        purpose = self._fields.get("purpose")
        if purpose is None:
            raise _missing("purpose", f"; one of: {', '.join(PURPOSES)}")
        if self._filename is None:
            raise _missing("file", "")
        if self._upload.num_bytes == 0:
            raise problems.invalid("file", "it is empty")
        return Label(
            project=caller.project,
            key_id=caller.key_id,
            filename=self._filename,
            purpose=cast(Purpose, purpose),
            lifetime_s=self._lifetime_s(),
        )

    def _keep(self, field: Field) -> None:
        name, value = field.name, field.value
        if name not in ("purpose", _ANCHOR, _SECONDS):
            valid = f"purpose, file, {_ANCHOR}, {_SECONDS}"
            raise ApiError(f"The form has an unknown field; valid: {valid}.", status=400)
        if name == "purpose" and value not in PURPOSES:
            raise problems.invalid("purpose", f"not one of: {', '.join(PURPOSES)}")
        if name == _ANCHOR and value != "created_at":
            raise problems.invalid(_ANCHOR, "allowed: created_at")
        if name == _SECONDS and not _is_lifetime(value):
            low, high = LIFETIME_S
            raise problems.invalid(_SECONDS, f"allowed: a whole number from {low} to {high}")
        self._fields[name] = value

    def _lifetime_s(self) -> int | None:
        for name, other in ((_ANCHOR, _SECONDS), (_SECONDS, _ANCHOR)):
            if name in self._fields and other not in self._fields:
                raise _missing(other, f", as {name} is given")
        return int(self._fields[_SECONDS]) if _SECONDS in self._fields else None

    async def _write(self) -> None:
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            await asyncio.to_thread(self._upload.write, data)
            self._require_training_data()

    def _require_training_data(self) -> None:
        """Raises ApiError (400) where it is for fine-tuning and cannot be."""
        if self._fields.get("purpose") != "fine-tune":
            return
        if self._filename is not None and not self._filename.lower().endswith(".jsonl"):
            raise problems.invalid("file", "its name must end in .jsonl for purpose fine-tune")
        if self._upload.lines.too_long is not None:
            raise incoming.line_too_long(self._upload.lines.too_long, self._max_line_bytes)


def _is_lifetime(value: str) -> bool:
    is_number = value.isascii() and value.isdigit() and len(value) <= 9
    return is_number and LIFETIME_S[0] <= int(value) <= LIFETIME_S[1]


def _missing(name: str, more: str) -> ApiError:
    return ApiError(f"{name} is missing; it is required{more}.", status=400, param=name)
