"""/v1/files: uploads, lists, downloads, deletion."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from cluster.registry.tables import File
from serving import multipart, pages, problems, upload
from serving.access import Caller, Tune
from serving.checking import Checking
from serving.pages import After, Order
from serving.problems import ApiError
from serving.shelf import FileLimits, Purpose, Shelf

PATH = "/v1/files"
_ID = re.compile(r"file-[0-9a-f]{24}")
_PIECE_BYTES = 256 << 10
_UPLOADS = 32
"""At once, in a replica."""
_UPLOADS_OF_PROJECT = 8
_RETRY_AFTER_S = 5.0


class FileObject(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None


class FileList(TypedDict):
    """A page of files."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": list(upload.PURPOSES)},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": upload.LIFETIME_S[0],
                            "maximum": upload.LIFETIME_S[1],
                        },
                    },
                    "additionalProperties": False,
                }
            }
        },
    }
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file's bytes"}
}


def body_limits(limits: FileLimits) -> dict[tuple[str, str], int]:
    """For `problems.install(longer=...)`: the one route that takes more than the others."""
    return {("POST", PATH): limits.max_file_bytes + multipart.OVERHEAD_BYTES}


def router(shelf: Shelf | None) -> APIRouter:
    """The routes; while they are served, files for fine-tuning are looked into.

    shelf: None where tuning is off; the routes then answer 404 and say so.
    """
    checking = Checking(shelf) if shelf is not None else None
    slots = _Slots()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if checking is None:
            yield
            return
        with checking:
            yield

    routes = APIRouter(prefix=PATH, lifespan=lifespan)

    def opened() -> Shelf:
        if shelf is None:
            message = "Fine-tuning is off on this server; its operator turns it on by `tuning:`."
            raise ApiError(message, status=404, code="unknown_url")
        return shelf

    async def found(caller: Caller, id: str) -> File:
        if not _ID.fullmatch(id):
            raise problems.not_found("file", id)
        return await asyncio.to_thread(opened().get, caller.project, id)

    @routes.post("", response_model=FileObject, openapi_extra=_FORM)
    async def create_file(request: Request, caller: Tune) -> Any:
        """Upload a file."""
        _require_no_other_site(request, caller)
        declared = request.headers.get("content-length", "")
        with slots.taken(caller.project):
            file = await upload.receive(
                opened(),
                request.stream(),
                caller=caller,
                content_type=request.headers.get("content-type", ""),
                expected_bytes=int(declared) if declared.isdigit() else 0,
            )
        if checking is not None:
            checking.wake()
        return described(file)

    @routes.get("", response_model=FileList)
    async def list_files(
        caller: Tune,
        purpose: Purpose | None = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Order = "desc",
    ) -> Any:
        """Your project's files."""
        page = await asyncio.to_thread(
            opened().list_, caller.project, purpose=purpose, after=after, limit=limit, order=order
        )
        return pages.listed([described(file) for file in page.rows], has_more=page.has_more)

    @routes.get("/{file_id}", response_model=FileObject)
    async def retrieve_file(file_id: str, caller: Tune) -> Any:
        """One file."""
        return described(await found(caller, file_id))

    @routes.get("/{file_id}/content", response_class=StreamingResponse, responses=_CONTENT)
    async def download_file(file_id: str, caller: Tune) -> StreamingResponse:
        """A file's bytes."""
        file = await found(caller, file_id)
        try:
            stream = await asyncio.to_thread(opened().path(file).open, "rb")
        except FileNotFoundError:  # deleted since
            raise problems.not_found("file", file_id) from None
        headers = {
            "Content-Length": str(file.bytes),
            "Content-Disposition": _disposition(file.filename),
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(_pieces(stream), 200, headers, "application/octet-stream")

    @routes.delete("/{file_id}", response_model=FileDeleted)
    async def delete_file(file_id: str, caller: Tune) -> Any:
        """Remove a file for good. A job that still needs it fails."""
        if not _ID.fullmatch(file_id):
            raise problems.not_found("file", file_id)
        await asyncio.to_thread(opened().delete, caller.project, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def described(file: File) -> FileObject:
    """A file as clients see it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,  # pyright: ignore[reportReturnType]
        "status_details": file.status_details,
    }


def _require_no_other_site(request: Request, caller: Caller) -> None:
    """Raises ApiError (403) for a form that another site's page sends to a server without keys.

    Browsers send forms anywhere without asking; JSON they do not.
    """
    site = request.headers.get("sec-fetch-site", "none")
    if not caller.key_id and site not in ("none", "same-origin"):
        raise problems.forbidden("A page of another site may not upload files here.")


class _Slots:
    """Bounds the uploads that are under way."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, project: str) -> Iterator[None]:
        """Raises ApiError: 429 where the project has too many, 503 where all together have."""
        if self._taken[project] >= _UPLOADS_OF_PROJECT:
            why = f"{_UPLOADS_OF_PROJECT} uploads of your project are under way; wait for one."
            raise problems.rate_limited(_RETRY_AFTER_S, why)
        if self._taken.total() >= _UPLOADS:
            raise problems.overloaded(_RETRY_AFTER_S)
        self._taken[project] += 1
        try:
            yield
        finally:
            self._taken[project] -= 1
            if not self._taken[project]:
                del self._taken[project]


async def _pieces(stream: IO[bytes]) -> AsyncIterator[bytes]:
    with stream:
        while data := await asyncio.to_thread(stream.read, _PIECE_BYTES):
            yield data


def _disposition(filename: str) -> str:
    """To be saved, never shown (RFC 6266)."""
    plain = "".join(char if char.isascii() and char not in '"\\%' else "_" for char in filename)
    extended = "" if plain == filename else f"; filename*=UTF-8''{quote(filename, safe='')}"
    return f'attachment; filename="{plain}"{extended}'
