"""Objects below a URL (s3://, gs://, ... through fsspec), and directories that are committed there.

An object is whole or absent, and cannot be renamed. `Remote.publish` therefore uploads the files
of a directory that `cluster.storage` has committed, sees that they are there, asks whether the
attempt has been fenced off, and writes `manifest.json` last: a remote directory without a valid
manifest does not exist. `Remote.fetch` brings one here and proves it by its sha256 digests. What
only one process may have is a numbered object that can be created once (`Remote.claim`).

Every request has a deadline; what may pass is tried again a few times, with a log line each time.

What is covered: stores that list what was written a moment ago, and refuse to create an object
that is there (S3 and its kin with If-None-Match, GCS); `Remote.check` asks for both.
What is not covered: bytes changed on their way up, which is found by whoever fetches them (clients
of S3 send a checksum along); a fenced attempt suspended for the instant between its fence check
and a write. Under a name of its own it could still publish one directory, a whole one; under a
name that attempts share it could damage what is there, which `fetch` finds.
"""

import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster import storage
from cluster.errors import ConfigError, StorageError, superseded

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://[^/:]+(/.*)?$")
_TRIES = 6
_FIRST_WAIT_S = 1.0
"""Doubled after each try."""
_REQUEST_S = 30.0
_BYTES_PER_S = 1 << 20
"""A transfer may take a second for each, beside a minute."""
_CONNECT_S = 5.0
_FETCH_LOCK_S = 1800.0
_SETTINGS = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_STORAGE_")
_SAFE = "Everything committed earlier is intact, and the same command resumes from it"

_log = logging.getLogger(__name__)


def is_url(place: str) -> bool:
    """Whether a `storage` setting names an object store rather than a directory."""
    return "://" in place and not place.startswith("file://")


def require_url(url: str) -> None:
    """Raise ConfigError where a URL cannot be the storage of a run."""
    if url.startswith("memory://"):
        raise ConfigError("storage is memory://, which no two processes share; name a real store")
    if not _URL.match(url):
        raise ConfigError(
            f"storage is {url!r}; allowed: a directory, file:///directory, or the URL of an object "
            "store such as s3://bucket/runs"
        )


def settings() -> dict[str, str]:
    """The variables of this process that say where stores are and who asks (secrets among them)."""
    return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}


def use_settings(variables: Mapping[str, str]) -> None:
    """Take over the `settings` of another process."""
    from fsspec.config import conf, set_conf_env

    os.environ.update(variables)
    set_conf_env(conf)  # fsspec reads them when it is imported


class Remote:
    """Objects below a URL, by names relative to it.

    tries: of each request; request_s: for one that transfers no file; sleep: waits between tries.
    Making one raises ConfigError where the
    library of the store is missing. All methods raise StorageError where the store cannot be
    reached, refuses, or keeps failing.
    """

    def __init__(
        self,
        url: str,
        *,
        tries: int = _TRIES,
        request_s: float = _REQUEST_S,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        require_url(url)
        self.url = url.rstrip("/")
        self._tries = tries
        self._request_s = request_s
        self._sleep = sleep
        self._fs, self._root = _open(self.url)

    def check(self) -> None:
        """Prove within seconds that this process may write here, and that the store is safe to use.

        Raises StorageError, or ConfigError for a store that lets two writers create one object.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        self.create(probe, b"1")
        is_exclusive = not self.create(probe, b"2")
        is_listed = self.sizes("").get(probe) == 1
        self.remove([probe])
        if not (is_exclusive and is_listed):
            raise ConfigError(
                f"{self.url}: this store lets two writers create the same object, or does not list "
                "what was written; runs are not safe there. Use a store with conditional writes "
                "(If-None-Match), such as S3, GCS or MinIO, or a mounted directory"
            )

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None where it is not there."""
        try:
            return self._call("cat_file", self._path(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        self._put("pipe_file", self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object that is not there; whether it holds what this caller gave.

        `data` is the caller's own: a try whose answer was lost is recognised by it.
        """
        try:
            self._put("pipe_file", self._path(name), data, mode="create")
        except FileExistsError:
            return self.read(name) == data
        return True

    def claim(self, folder: str, data: bytes, *, after: int) -> bool:
        """Be the only one to create number `after + 1` of a folder; whether this caller is."""
        return self.create(f"{folder}/{after + 1:06d}", data)

    def newest(self, folder: str) -> int:
        """The highest number claimed in a folder; 0 where there is none."""
        numbers = [int(name) for name in self.sizes(folder) if name.isdecimal()]
        return max(numbers, default=0)

    def sizes(self, folder: str) -> dict[str, int]:
        """Size in bytes of every object below a folder, by its name relative to it."""
        path = self._path(folder)
        self._fs.invalidate_cache()
        try:
            found: Mapping[str, Any] = self._call("find", path, detail=True)
        except FileNotFoundError:
            return {}
        prefix = f"{path}/"
        return {
            name.removeprefix(prefix): int(entry["size"])
            for name, entry in sorted(found.items())
            if name.startswith(prefix)
        }

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, in this order; those that are not there are passed over."""
        for name in names:
            try:
                self._call("rm_file", self._path(name))
            except FileNotFoundError:
                continue

    def age_s(self, name: str) -> float:
        """Seconds since an object was written, by the store's own clock; infinite if it is gone."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"now")
        now, then = (self._written(one) for one in (probe, name))
        self.remove([probe])
        return float("inf") if now is None or then is None else (now - then).total_seconds()

    def publish(self, directory: Path, name: str, *, is_fenced: Callable[[], bool]) -> None:
        """Commit a copy of a committed local directory as `name`, in place of what is there.

        Until its last step `name` does not exist. Raises StorageError where the attempt is fenced.
        """
        manifest = storage.read_manifest(directory)
        marker = f"{name}/{storage.MANIFEST}"
        self._refuse_fenced(name, is_fenced)
        self.remove([marker])
        for file, entry in manifest.files.items():
            self._refuse_fenced(name, is_fenced)
            self._put(
                "put_file",
                str(directory / file),
                self._path(f"{name}/{file}"),
                timeout_s=_transfer_s(entry.size_bytes),
            )
        there = self.sizes(name)
        for file, entry in manifest.files.items():
            if there.pop(file, None) != entry.size_bytes:
                raise StorageError(
                    f"{self.url}/{name}/{file} was uploaded, but the store does not show it whole; "
                    f"{name} was not committed. {_SAFE}"
                )
        self.remove(f"{name}/{file}" for file in there)  # of an earlier one
        self._refuse_fenced(name, is_fenced)
        self.write(marker, (directory / storage.MANIFEST).read_bytes())

    def fetch(self, name: str, final: Path) -> str | None:
        """Make the local directory `final` a verified copy of `name`; what is wrong, if it is.

        Nothing is transferred where it is one already. Processes of one machine take turns.
        Raises ResourceError where the disk has no room.
        """
        marker = self.read(f"{name}/{storage.MANIFEST}")
        if marker is None:
            return f"it has no {storage.MANIFEST}: it was never committed"
        storage.make_directory(final.parent)
        with FileLock(final.parent / f".{final.name}.lock", timeout=_FETCH_LOCK_S):
            if _is_copy(final, marker):
                return None
            temporary = final.parent / f".tmp-fetch-{uuid.uuid4().hex[:12]}-{final.name}"
            try:
                reason = self._download(name, marker, temporary)
                if reason is not None:  # the bytes may have been changed on their way here, too
                    _log.warning("damaged=%s/%s reason=%r fetch_again=1", self.url, name, reason)
                    shutil.rmtree(temporary)
                    reason = self._download(name, marker, temporary)
                if reason is None:
                    storage.install(temporary, final)
                return reason
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def retire(self, name: str) -> None:
        """Remove a published directory: first its marker, so that it does not exist, then the rest.

        A crash in between leaves files that are nothing.
        """
        self.remove([f"{name}/{storage.MANIFEST}"])
        self.remove(f"{name}/{file}" for file in self.sizes(name))

    def _download(self, name: str, marker: bytes, target: Path) -> str | None:
        """Fill a new directory; what is wrong with what came."""
        target.mkdir()
        (target / storage.MANIFEST).write_bytes(marker)
        try:
            files = storage.read_manifest(target).files
        except StorageError as error:
            return str(error).replace(str(target), f"{self.url}/{name}")
        size_bytes = sum(entry.size_bytes for entry in files.values())
        storage.require_free(target, size_bytes, purpose=f"a copy of {self.url}/{name}")
        for file, entry in files.items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            path, limit_s = self._path(f"{name}/{file}"), _transfer_s(entry.size_bytes)
            try:
                self._call("get_file", path, str(target / file), timeout_s=limit_s)
            except FileNotFoundError:
                return f"{file} is missing"
        try:
            storage.verify(target)
        except StorageError as error:
            return str(error).replace(str(target), f"{self.url}/{name}")
        return None

    def _refuse_fenced(self, name: str, is_fenced: Callable[[], bool]) -> None:
        if is_fenced():
            raise superseded(f"{self.url}/{name} was not committed")

    def _written(self, name: str) -> datetime | None:
        try:
            entry: Mapping[str, Any] = self._call("info", self._path(name))
        except FileNotFoundError:
            return None
        return next(entry[k] for k in ("LastModified", "mtime", "last_modified") if k in entry)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _put(self, method: str, *arguments: object, **options: Any) -> None:
        try:
            self._call(method, *arguments, **options)
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.url}: the bucket does not exist ({error}); create it, or correct storage="
            ) from error

    def _call(
        self, method: str, *arguments: object, timeout_s: float | None = None, **options: Any
    ) -> Any:
        """One request, tried again while it may pass.

        FileNotFoundError and FileExistsError come through.
        """
        wait_s = _FIRST_WAIT_S
        for number in range(1, self._tries + 1):
            try:
                return self._request(method, arguments, options, timeout_s or self._request_s)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # each store has its own kinds
                if _is_taken(error):
                    raise FileExistsError(str(error)) from error
                if _is_final(error) or number == self._tries:
                    raise StorageError(self._explain(method, error, number)) from error
                _log.warning(
                    "store=%s request=%s failed_try=%d of=%d again_in_s=%g error=%r",
                    self.url, method, number, self._tries, wait_s, error,
                )  # fmt: skip
            self._sleep(wait_s)
            wait_s *= 2
        raise AssertionError("not reached")

    def _request(
        self,
        method: str,
        arguments: tuple[object, ...],
        options: Mapping[str, Any],
        timeout_s: float,
    ) -> Any:
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*arguments, **options)
        from fsspec.asyn import sync

        call = getattr(self._fs, f"_{method}")
        return sync(self._fs.loop, call, *arguments, timeout=timeout_s, **options)

    def _explain(self, method: str, error: Exception, tries: int) -> str:
        words = f"{type(error).__name__}: {error}".strip()
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return (
                f"{self.url}: the store refuses ({words}). Check the credentials (AWS_PROFILE, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role) and that they "
                f"may list, read, write and delete there. {_SAFE}"
            )
        if _is_full(error):
            return f"{self.url}: the local disk is full ({words}); free space there. {_SAFE}"
        return (
            f"{self.url}: {method} failed, tried {tries} times ({words}). Check that the store is "
            f"up, the endpoint (FSSPEC_S3_ENDPOINT_URL) and the network, then start again. {_SAFE}"
        )


def _open(url: str) -> tuple[Any, str]:
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    protocol = url.split("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):  # Remote has the retries, and tells of them; botocore's are mute
        given = conf.get(protocol, {}).get("config_kwargs", {})
        once = {"total_max_attempts": 1, "mode": "standard"}
        limits = {"connect_timeout": _CONNECT_S, "read_timeout": 60.0, "retries": once}
        options = {"config_kwargs": {**limits, **given}}
    try:
        fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        extra = "'loray[s3]'" if protocol in ("s3", "s3a") else "the library it names"
        raise ConfigError(
            f"storage is {url!r}, but {error}; pip install {extra} here and on every node"
        ) from None
    except ValueError as error:
        raise ConfigError(f"storage is {url!r}: {error}; use s3://, gs:// or a directory") from None
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs, root.rstrip("/")


def _is_copy(final: Path, marker: bytes) -> bool:
    try:
        storage.verify(final)
        return (final / storage.MANIFEST).read_bytes() == marker
    except StorageError:
        return False


def _transfer_s(size_bytes: int) -> float:
    return 60.0 + size_bytes / _BYTES_PER_S


def _is_taken(error: Exception) -> bool:
    """Whether a conditional write found the object there (s3fs 2026.9 sees it only on AWS)."""
    answer = getattr(error.__cause__, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in (
        "PreconditionFailed",
        "412",
    )


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    is_wrong = isinstance(error, PermissionError | TypeError | ValueError | NotImplementedError)
    return is_wrong or _is_full(error) or "Credentials" in type(error).__name__


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
