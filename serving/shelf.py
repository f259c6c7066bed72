"""The files of the files API: bytes in `<directory>/files`, rows in the registry.

Several processes may share a shelf. A file gets its final name before its row, and loses its row
before its bytes: what has no row, or a deleted one, and no living writer is left over, and `clean`
removes it.

What is not covered: object stores, and mounts on which flock does not reach other machines (there a
replica could take another one's upload for a dead one's).
"""

import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster import storage
from cluster.errors import RegistryError, ResourceError
from cluster.registry.database import Database
from cluster.registry.tables import File
from serving import incoming, pages, problems
from serving.finding import Finding
from serving.incoming import Incoming
from serving.pages import Order, Page
from serving.problems import ApiError

Purpose = Literal[
    "assistants", "batch", "fine-tune", "vision", "user_data", "evals", "fine-tune-results"
]
Status = Literal["uploaded", "processed", "error"]
FOLDER = "files"
MAX_FILENAME_CHARS = 255
_RESERVE_BYTES = 256 << 20
"""Room that uploads leave on the disk: the registry and the runs need some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileLimits:
    """How much a shelf takes."""

    max_file_bytes: int = 512 << 20
    """Largest file."""
    max_line_bytes: int = 8 << 20
    """Longest line of a file for fine-tuning."""
    max_project_bytes: int = 10 << 30
    """Of all files of a project."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What is said of a file beside its bytes."""

    project: str
    filename: str
    purpose: Purpose
    key_id: str = ""
    lifetime_s: int | None = None
    """Seconds from its creation on; None: until it is deleted."""


class Shelf:
    """The store. Its methods block: async code calls them in threads."""

    def __init__(
        self,
        database: Database,
        directory: Path,
        limits: FileLimits,
        clock: Callable[[], float],
    ) -> None:
        """directory: the service's storage, which is made if need be."""
        self._database = database
        self._directory = directory
        self._folder = directory / FOLDER
        self.limits = limits
        self._clock = clock
        storage.make_directory(self._folder)

    def receive(self, project: str, *, expected_bytes: int = 0) -> Incoming:
        """A writer for a new file. expected_bytes: where the client says how many come.

        Raises ApiError: 507 without room on the disk, 400 where the project has used up its share.
        """
        self.expire()
        with self._database.read() as session:
            left = self.limits.max_project_bytes - self._used(session, project)
        if left <= 0 or min(expected_bytes, self.limits.max_file_bytes) > left:
            raise self._quota_exceeded()
        return self._open(expected_bytes)

    def _open(self, expected_bytes: int) -> Incoming:
        try:
            storage.require_free(self._folder, expected_bytes + _RESERVE_BYTES, purpose="an upload")
        except ResourceError:  # its text names our directories
            raise incoming.full() from None
        return Incoming(
            self._folder,
            max_bytes=self.limits.max_file_bytes,
            max_line_bytes=self.limits.max_line_bytes,
        )

    def keep(self, upload: Incoming, label: Label, *, id: str | None = None) -> File:
        """Make a whole upload a file. id: None makes one.

        Raises ApiError: 400 beyond the project's share, 500, 507; IntegrityError for an id that is
        there.
        """
        stem = f"file-{secrets.token_hex(12)}"
        is_training = label.purpose == "fine-tune"
        name = f"{stem}.jsonl" if is_training else stem  # by which readers of data know the format
        upload.rename(name)
        now = self._clock()
        row = File(
            id=id or stem,
            project=label.project,
            key_id=label.key_id or None,
            filename=label.filename,
            purpose=label.purpose,
            bytes=upload.num_bytes,
            sha256=upload.sha256,
            path=f"{FOLDER}/{name}",
            created_at=now,
            expires_at=None if label.lifetime_s is None else now + label.lifetime_s,
            deleted_at=None,
            status="uploaded" if is_training else "processed",
            status_details=None,
            examples=None,
        )
        upload.is_kept = True
        try:
            with self._database.write() as session:
                self._require_share(session, row)
                session.add(row)
        except RegistryError:  # the row may have been kept all the same; `clean` will know
            raise
        except BaseException:
            upload.is_kept = False
            raise
        return row

    def put(
        self, project: str, filename: str, purpose: Purpose, content: bytes, *, id: str
    ) -> File:
        """Store a file of the service's own, such as a job's results; one for an id, the first.

        Results are stored also where the project has used up its share. Raises ApiError (413, 507).
        """
        label = Label(project=project, filename=filename, purpose=purpose)
        found = self._row(id)
        if found is not None:
            return found
        upload = self._open(len(content))
        try:
            upload.write(content)
            return self.keep(upload, label, id=id)
        except IntegrityError:  # another was quicker
            found = self._row(id)
            assert found is not None
            return found
        finally:
            upload.close()

    def get(self, project: str, id: str) -> File:
        """The row of a file. Raises ApiError (404) for what the project does not have."""
        with self._database.read() as session:
            row = session.scalar(select(File).where(File.id == id, *self._seen_by(project)))
        if row is None:
            raise problems.not_found("file", id)
        return row

    def path(self, file: File) -> Path:
        """Where the bytes lie."""
        return storage.join(self._directory, file.path)

    def list_(
        self,
        project: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10000,
        order: Order = "desc",
    ) -> Page[File]:
        """The files of a project, page by page. Raises ApiError (400) for an unknown `after`."""
        where = list(self._seen_by(project))
        if purpose is not None:
            where.append(File.purpose == purpose)
        with self._database.read() as session:
            return pages.page(
                session,
                File,
                within=[File.project == project],
                where=where,
                after=after,
                limit=limit,
                order=order,
            )

    def delete(self, project: str, id: str) -> None:
        """Remove a file for good. Raises ApiError (404) for what the project does not have."""
        with self._database.write() as session:
            row = session.scalar(select(File).where(File.id == id, *self._seen_by(project)))
            if row is None:
                raise problems.not_found("file", id)
            row.deleted_at = self._clock()
        self._remove([row])

    def expire(self) -> None:
        """Remove the files whose time is over."""
        due = (File.deleted_at.is_(None), File.expires_at <= self._clock())
        with self._database.read() as session:
            if session.scalar(select(File.number).where(*due).limit(1)) is None:
                return
        with self._database.write() as session:
            rows = session.scalars(select(File).where(*due)).all()
            for row in rows:
                row.deleted_at = self._clock()
        self._remove(rows)

    def clean(self) -> list[Path]:
        """Remove what dead writers and deleters have left; the paths. Living ones are let be."""
        with self._database.read() as session:
            live = set(session.scalars(select(File.path).where(File.deleted_at.is_(None))))
        removed: list[Path] = []
        for path in sorted(self._folder.iterdir()):
            if f"{FOLDER}/{path.name}" in live or not path.is_file():
                continue
            with incoming.locked(path) as is_ours:
                # Locked first and looked up then: its writer has ended, with a row or without.
                is_temporary = path.name.startswith(incoming.TEMPORARY)
                is_left = is_temporary or path.name.startswith("file-")
                if is_ours and is_left and (is_temporary or not self._is_live(path.name)):
                    path.unlink(missing_ok=True)
                    removed.append(path)
        if removed:
            incoming.fsync(self._folder)
        return removed

    def unchecked(self) -> Sequence[File]:
        """Files for fine-tuning that nobody has looked into, the oldest first."""
        is_unchecked = (File.status == "uploaded", *self._is_there())
        with self._database.read() as session:
            return session.scalars(select(File).where(*is_unchecked).order_by(File.number)).all()

    def judge(self, id: str, found: Finding) -> None:
        """Write down what was found in a file; its details are problems, or else warnings."""
        status: Status = "processed" if found.details is None else "error"
        with self._database.write() as session:
            session.execute(
                update(File)
                .where(File.id == id, File.status == "uploaded")
                .values(
                    status=status,
                    status_details=found.details or found.warning,
                    examples=found.examples,
                )
            )

    def _used(self, session: Session, project: str) -> int:
        """Bytes of the files of a project."""
        total = select(func.sum(File.bytes)).where(
            File.project == project, File.deleted_at.is_(None)
        )
        return int(session.scalar(total) or 0)

    def _require_share(self, session: Session, row: File) -> None:
        """Raises ApiError (400) where a new file does not fit into its project's share."""
        if row.purpose == "fine-tune-results":
            return
        if not self._database.is_sqlite:  # where writers do not take turns by themselves
            place = func.hashtext(f"files {row.project}")
            session.execute(select(func.pg_advisory_xact_lock(place)))
        if self._used(session, row.project) + row.bytes > self.limits.max_project_bytes:
            raise self._quota_exceeded()

    def _quota_exceeded(self) -> ApiError:
        return ApiError(
            f"file: it does not fit into your project's {self.limits.max_project_bytes} bytes of "
            "storage beside what is there; delete files that are not needed",
            status=400,
            code="exceeded_quota",
            param="file",
        )

    def _row(self, id: str) -> File | None:
        with self._database.read() as session:
            return session.scalar(select(File).where(File.id == id))

    def _is_live(self, name: str) -> bool:
        """Whether there is a row for bytes of this name."""
        with self._database.read() as session:
            is_its = (File.path == f"{FOLDER}/{name}", File.deleted_at.is_(None))
            return session.scalar(select(File.number).where(*is_its)) is not None

    def _is_there(self) -> tuple[ColumnElement[bool], ...]:
        return (
            File.deleted_at.is_(None),
            File.expires_at.is_(None) | (File.expires_at > self._clock()),
        )

    def _seen_by(self, project: str) -> tuple[ColumnElement[bool], ...]:
        return (File.project == project, *self._is_there())

    def _remove(self, rows: Sequence[File]) -> None:
        """The bytes of deleted rows; what a crash leaves of them, `clean` takes."""
        for row in rows:
            self.path(row).unlink(missing_ok=True)
        with suppress(OSError):
            incoming.fsync(self._folder)


def plain_filename(given: str) -> str:
    """A file's name as data: its last part, without characters that do not show, and bounded."""
    name = os.path.basename(given.replace("\\", "/")).strip()
    name = "".join(char if char.isprintable() else "_" for char in name)
    stem, dot, suffix = name.rpartition(".")
    if len(name) > MAX_FILENAME_CHARS and dot and len(suffix) <= 16:
        return f"{stem[: MAX_FILENAME_CHARS - len(suffix) - 1]}.{suffix}"
    return name[:MAX_FILENAME_CHARS]
