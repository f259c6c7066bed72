"""Directories that are either whole or absent, and files that are never half written.

`commit` writes into `.tmp-<attempt>-<name>/`, fsyncs every file, adds `manifest.json` (size and
sha256 of each file, and a checksum of itself), fsyncs, asks whether the attempt has been fenced
off, renames to the final name and fsyncs the parent. A crash at any point leaves either no new
directory or a whole one; earlier directories are not touched. `verify` proves a directory to be
what was written.

Names with a leading dot belong to this module: `.tmp-*` is unfinished, `.old-*` was being
replaced, `.broken-*` is quarantined.

What is covered: local and mounted directories on which rename, fsync and flock do what POSIX says.
What is not covered: object stores (`cluster.remote`), and a fenced attempt that is suspended for
the instant between its fence check and its rename (it could still publish one directory, a whole
and verified one).
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, cast

from cluster.errors import (
    ConfigError,
    LorayError,
    ResourceError,
    StorageError,
    superseded,
)

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What `manifest.json` can hold."""

MANIFEST = "manifest.json"
_FORMAT = 1
_MAX_MANIFEST_BYTES = 16 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What one committed file must look like."""

    size_bytes: int
    """Length of the file."""
    sha256: str
    """Hex digest of its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a committed directory holds."""

    files: Mapping[str, FileEntry]
    """Path relative to the directory, with `/`, -> its size and digest."""
    info: Mapping[str, JSON]
    """What the writer said about the content."""
    checksum: str
    """Hex sha256 over files and info."""


def commit(
    final: Path,
    write: Callable[[Path], None],
    *,
    attempt: str,
    info: Mapping[str, JSON] | None = None,
    is_fenced: Callable[[], bool] | None = None,
    replace: bool = False,
) -> Manifest:
    """Create directory `final` in one step out of what `write(directory)` puts into it.

    `attempt` tells concurrent writers apart; `is_fenced` is asked last, and FencedError raised when
    true. With `replace`, an existing `final` is moved to `.old-<name>` just before the rename and
    removed after it; a crash between the two leaves `.old-<name>`, which `clean_leftovers` puts
    back. Raises StorageError where `final` exists and replace is false, on a full disk and on any
    other I/O error; whatever `write` raises besides comes through. The temporary directory is gone
    in every one of these cases.
    """
    assert attempt.replace("-", "").isalnum(), f"attempt {attempt!r}"
    entries = dict(info or {})
    _encode({}, entries, where=final)
    temporary = final.parent / f".tmp-{attempt}-{final.name}"
    try:
        if final.exists() and not replace:
            raise StorageError(
                f"{final} exists already; committed directories are never overwritten. "
                "Choose another name, or remove it if it is not needed"
            )
        make_directory(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        manifest = _seal(temporary, entries)
        if is_fenced is not None and is_fenced():
            raise superseded(f"{final} was not committed")
        _publish(temporary, final)
        return manifest
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and is_fenced is not None and is_fenced():
            # Whoever goes on in its place has cleaned up here.
            raise superseded(f"{final} was not committed") from error
        if isinstance(error, Exception):
            _raise_explained(error, final)
        raise


def install(temporary: Path, final: Path) -> None:
    """Rename a verified directory that was brought from elsewhere to `final`, replacing that.

    Raises StorageError on any I/O error; `final` is then what it was.
    """
    try:
        for _, path in _walk(temporary):
            _fsync(path)
        for folder, _, _ in os.walk(temporary):
            _fsync(Path(folder))
        _publish(temporary, final)
    except OSError as error:
        _raise_explained(error, final)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed directory, its own checksum checked; files are not looked at.

    Raises StorageError where it is missing, unreadable or altered.
    """
    path = directory / MANIFEST
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise StorageError(f"{directory} has no {MANIFEST}: it was never committed") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error})") from None
    if len(data) > _MAX_MANIFEST_BYTES:
        raise StorageError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes: not a manifest")
    try:
        tree = json.loads(data, parse_constant=_refuse_constant)
        files = {
            name: FileEntry(size_bytes=entry["size_bytes"], sha256=entry["sha256"])
            for name, entry in tree["files"].items()
        }
        manifest = Manifest(files=files, info=dict(tree["info"]), checksum=tree["checksum"])
        rendered = _encode(files, manifest.info, where=directory)[0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StorageError(f"{path} is not a manifest: truncated or altered") from None
    if rendered != data:
        raise StorageError(f"{path} does not match its own checksum: altered after it was written")
    for name in files:
        _inside(directory, name)
    return manifest


def verify(directory: Path) -> Manifest:
    """Read every file of a committed directory and compare it with the manifest.

    Raises StorageError naming the first file that is missing, extra (names with a leading dot are
    ignored), truncated, altered or not a plain file.
    """
    manifest = read_manifest(directory)
    try:
        present = {name: path for name, path in _walk(directory) if name != MANIFEST}
        for name, entry in manifest.files.items():
            path = present.pop(name, None)
            if path is None:
                raise StorageError(f"{directory}: {name} is missing")
            if path.is_symlink() or not path.is_file():
                raise StorageError(f"{directory}: {name} is not a plain file any more")
            size_bytes = path.stat().st_size
            if size_bytes != entry.size_bytes:
                raise StorageError(
                    f"{directory}: {name} is truncated or grown: {size_bytes} bytes, "
                    f"{entry.size_bytes} were written"
                )
            if _digest(path) != entry.sha256:
                raise StorageError(
                    f"{directory}: {name} is altered: its sha256 differs from what was written"
                )
        for name in present:
            if not any(part.startswith(".") for part in name.split("/")):
                raise StorageError(f"{directory}: {name} is extra: it was not committed with it")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{directory} cannot be read ({error})") from None
    return manifest


def quarantine(directory: Path, reason: str) -> Path:
    """Rename a broken directory to `.broken-<name>-<n>` beside it and return that path.

    The reason is written into it as reason.txt. Raises StorageError where it cannot be renamed.
    """
    number = 1
    while (target := directory.parent / f".broken-{directory.name}-{number}").exists():
        number += 1
    try:
        os.rename(directory, target)
        _fsync(directory.parent)
    except OSError as error:
        raise StorageError(
            f"{directory} is broken ({reason}) and cannot be moved aside ({error}); move it by hand"
        ) from None
    _log.warning("quarantined=%s moved_to=%s reason=%r", directory, target, reason)
    try:
        write_file(target / "reason.txt", f"{reason}\n".encode())
    except StorageError as error:  # A full disk must not stop the fall-back to an older directory.
        _log.warning("reason_not_written=%s error=%r", target, str(error))
    return target


def write_file(path: Path, data: bytes) -> None:
    """Create or replace a file in one step: afterwards it holds all of `data`, or what it held.

    Raises StorageError on a full disk and any other I/O error.
    """
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, Exception):
            _raise_explained(error, path)
        raise


def clean_leftovers(directory: Path) -> list[Path]:
    """Remove what crashed writers left in a directory, put back what they were replacing.

    Returns the paths that were removed or put back. Call it only as the owner of the run, or as its
    newest attempt: it would also remove what a live writer is working on.
    """
    touched: list[Path] = []
    for path in sorted(directory.glob(".tmp-*")):
        _remove(path)
        touched.append(path)
    for path in sorted(directory.glob(".old-*")):
        final = directory / path.name.removeprefix(".old-")
        if final.exists():
            _remove(path)
        else:
            os.rename(path, final)
            _fsync(directory)
        touched.append(path)
    return touched


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Raise StorageError in place of any I/O error of the block, which writes `target`."""
    try:
        yield
    except Exception as error:
        _raise_explained(error, target)
        raise


def cache_dir() -> Path:
    """Where what can be made again is kept: `$LORAY_CACHE`, or `~/.cache/loray`."""
    chosen = os.environ.get("LORAY_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "loray"


def require_free(directory: Path, num_bytes: int, *, purpose: str) -> None:
    """Raise ResourceError where the file system of `directory` has less than `num_bytes` free."""
    free_bytes = _free_bytes(directory)
    if free_bytes < num_bytes:
        raise ResourceError(
            f"{purpose} needs {_human(num_bytes)} ({num_bytes} bytes) in {directory}, which has "
            f"{_human(free_bytes)} ({free_bytes} bytes) free; free {_human(num_bytes - free_bytes)}"
            " there, or choose another directory"
        )


def join(root: Path, name: str) -> Path:
    """`root / name` for a relative name that stays inside root, links resolved.

    Raises ConfigError for an empty or absolute name, `..`, `.`, a backslash, a control character,
    or a symbolic link that leads out.
    """
    parts = name.split("/")
    is_plain = name.isprintable() and "\\" not in name
    if not is_plain or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(
            f"name {name!r} is not usable below {root}; allowed: a relative path without '..', "
            "'.', empty parts, backslashes or control characters"
        )
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"name {name!r} leads out of {root} through a link; name a path inside")
    return path


def _seal(directory: Path, info: Mapping[str, JSON]) -> Manifest:
    files: dict[str, FileEntry] = {}
    for name, path in _walk(directory):
        if path.is_symlink() or not path.is_file():
            raise StorageError(f"{path} is not a plain file; only plain files can be committed")
        if name == MANIFEST:
            raise StorageError(f"{path}: the name {MANIFEST} is reserved; write another")
        _fsync(path)
        files[name] = FileEntry(size_bytes=path.stat().st_size, sha256=_digest(path))
    data, checksum = _encode(files, info, where=directory)
    with (directory / MANIFEST).open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    for folder, _, _ in os.walk(directory):
        _fsync(Path(folder))
    return Manifest(files=files, info=info, checksum=checksum)


def _publish(temporary: Path, final: Path) -> None:
    old = final.parent / f".old-{final.name}"
    if final.exists():
        _remove(old)
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    _fsync(final.parent)
    _remove(old)


def _encode(
    files: Mapping[str, FileEntry], info: Mapping[str, JSON], *, where: Path
) -> tuple[bytes, str]:
    """The only rendering of a manifest, so that not even its white space can change unseen."""
    tree: dict[str, object] = {
        "format": _FORMAT,
        "files": {name: asdict(entry) for name, entry in files.items()},
        "info": dict(info),
    }
    try:
        bare = json.dumps(tree, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise StorageError(f"{where}: info is not JSON ({error}); give finite numbers") from None
    tree["checksum"] = hashlib.sha256(bare).hexdigest()
    text = json.dumps(tree, sort_keys=True, allow_nan=False, indent=2)
    return f"{text}\n".encode(), cast(str, tree["checksum"])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a directory that is not a directory itself, sorted by relative name."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(directory).as_posix(), path


def _inside(directory: Path, name: str) -> None:
    try:
        join(directory, name)
    except ConfigError as error:
        raise StorageError(f"{directory / MANIFEST}: {error}") from None


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """mkdir -p whose result survives a power cut."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    try:
        directory.mkdir(exist_ok=True)
        _fsync(directory.parent)
    except OSError as error:
        _raise_explained(error, directory)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _raise_explained(error: Exception, target: Path) -> None:
    """Raise what an I/O error means for the user; return where it is none."""
    if isinstance(error, LorayError):
        return
    # safetensors 0.8 reports a full disk as SafetensorError, with the system's words in its text.
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    words = ("No space left on device", "Disk quota exceeded")
    if code in (errno.ENOSPC, errno.EDQUOT) or any(word in text for word in words):
        free_bytes = _free_bytes(target.parent)
        raise StorageError(
            f"the disk or quota is full: writing {target} failed with {_human(free_bytes)} "
            f"({free_bytes} bytes) free in {target.parent}. Nothing half-written was kept and "
            "everything committed earlier is intact; free space there and start again"
        ) from error
    if isinstance(error, OSError):
        raise StorageError(
            f"writing {target} failed ({error}). Everything committed earlier is intact; check "
            "the directory and its permissions, then start again"
        ) from error


def _free_bytes(directory: Path) -> int:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _human(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
