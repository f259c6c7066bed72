"""Token sets on disk, each made once: a directory for each source, tokenizer and template.

`<storage>/.tokens/<key>/` lies beside the runs, so that the driver makes it and all workers map the
same files. The key covers the contents and names of the source, the tokenizer, the encoder's
settings and the code, so an entry never becomes wrong, only useless. Nothing is deleted: another
node may have it mapped. `.tokens` may be removed by hand while no run is alive.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
from filelock import FileLock
from filelock import Timeout as LockTimeout

from cluster import storage
from cluster.errors import DataError, ResourceError, StorageError
from training import encoding, examples, sources, token_files
from training.config import DataConfig
from training.examples import BadRow, Example
from training.sources import Source
from training.token_set import TokenSet
from training.tokens import Encoder

_FORMAT = "2"
_ATTEMPT = "tokens"
PATIENCE_S = 600.0
"""How long another process may be at a set without writing anything."""
_POLL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A token set that is wanted."""

    source: Source
    data: DataConfig
    encoder: Encoder
    tokenizer_fingerprint: str


def load(
    wanted: Request,
    roots: Sequence[Path],
    *,
    known: str | None = None,
    num_processes: int | None = None,
    patience_s: float = PATIENCE_S,
) -> TokenSet:
    """The token set of a source out of the first of `roots` that has it, or can hold it.

    known: the key that another process has found, checked and made; the source is not read then,
    and of the files only the sizes are checked. Otherwise every byte is: what is damaged is made
    again, with a warning. While another process makes the set, this one waits.
    Raises DataError as `examples.read` does, where no row can be used, and where a file is written
    to meanwhile; StorageError where nothing can be written, or the disk is full; ResourceError
    where another process makes no headway for `patience_s`.
    """
    for root in roots if known else ():
        found = _opened(root / str(known), is_proved=True)
        if found is not None:
            return found
    before = sources.state(wanted.source)
    contents = sources.fingerprint(wanted.source)
    key = _key(wanted, contents)
    for root in roots:
        found = _opened(root / key, is_proved=False)
        if found is not None:
            return _accepted(found, wanted.data)
    for root in roots:
        try:
            lock = _acquire(root, key, patience_s)
        except StorageError as error:
            _log.warning("tokens_root=%s unusable=%r", root, str(error))
            continue
        try:
            return _accepted(
                _made(root / key, wanted, before, contents, num_processes), wanted.data
            )
        finally:
            lock.release()
    places = " and ".join(map(str, roots))
    raise StorageError(
        f"the tokens of {_shown(wanted.source)} can be written neither to {places}; the log says "
        "why. Give a storage that you may write to, or set LORAY_CACHE to a directory"
    )


def _made(
    final: Path,
    wanted: Request,
    before: object,
    contents: str,
    num_processes: int | None,
) -> TokenSet:
    """Make a token set, or find that another process has, while this one waited for the lock."""
    found = _opened(final, is_proved=False)
    if found is not None:
        return found
    _sweep(final.parent)
    started = time.monotonic()

    def fill(directory: Path) -> None:
        rows = _Rows(wanted)
        blocks = encoding.blocks(rows, wanted.encoder, num_processes=num_processes)
        facts = token_files.write(directory, blocks)
        if (
            sources.state(wanted.source) != before
            and sources.fingerprint(wanted.source) != contents
        ):
            raise DataError(
                f"{_shown(wanted.source)} was changed while it was tokenised; start again when "
                "nothing writes to it any more"
            )
        if (facts.num_bad and rows.stops) or not facts.num_examples:
            raise examples.bad_rows_error(facts.bad, num_bad=facts.num_bad, num_rows=rows.num_rows)

    storage.commit(final, fill, attempt=_ATTEMPT, replace=True)
    found = TokenSet(final)
    seconds = time.monotonic() - started
    _log.info("token_set=made path=%s examples=%d seconds=%.1f", final, len(found), seconds)
    return found


class _Rows:
    """The rows of a source, counted. Once a bad row will stop the run, only bad ones go on."""

    def __init__(self, wanted: Request) -> None:
        self.num_rows = 0
        self.stops = wanted.data.on_bad_row == "error"
        self._stream = examples.stream(wanted.source, format=wanted.data.format)

    def __iter__(self) -> Iterator[Example | BadRow]:
        is_stopped = False
        for row in self._stream:
            self.num_rows += 1
            is_stopped = is_stopped or (self.stops and isinstance(row, BadRow))
            if not is_stopped or isinstance(row, BadRow):
                yield row


def _accepted(found: TokenSet, data: DataConfig) -> TokenSet:
    facts = found.facts
    if facts.num_bad and data.on_bad_row == "error":
        num_rows = facts.num_examples + facts.num_bad
        raise examples.bad_rows_error(facts.bad, num_bad=facts.num_bad, num_rows=num_rows)
    return found


def _opened(directory: Path, *, is_proved: bool) -> TokenSet | None:
    """The set in a directory; None where there is none, or it is not what was written."""
    if not directory.exists():
        return None
    try:
        if not is_proved:
            storage.verify(directory)
        return TokenSet(directory)
    except StorageError as error:
        _log.warning("token_set=damaged path=%s reason=%r", directory, str(error))
        return None


def _acquire(root: Path, key: str, patience_s: float) -> FileLock:
    """The lock of a key, once whoever has it is done. Raises StorageError where there can be none.

    The lock ends with its process (flock), so who waits takes over from a maker that died.
    """
    storage.make_directory(root)
    lock = _lock(root, key)
    written, since = -1, time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_POLL_S)
            return lock
        except LockTimeout:
            now = _num_bytes(root / f".tmp-{_ATTEMPT}-{key}")
            if now == written and time.monotonic() - since > patience_s:
                raise ResourceError(
                    f"{root / key}: another process has been tokenising the same examples, and has "
                    f"written nothing for {patience_s:.0f} s; stop it and try again"
                ) from None
            if written < 0:
                _log.info("token_set=awaited path=%s", root / key)
            if now != written:
                written, since = now, time.monotonic()
        except OSError as error:
            raise StorageError(f"{root} cannot be locked ({error})") from None


def _lock(root: Path, key: str) -> FileLock:
    # Without flock, filelock would use a marker file, which survives a killed owner.
    return FileLock(root / f".lock-{key}", fallback_to_soft=False)


def _sweep(root: Path) -> None:
    """Remove what makers that died have left of other sets."""
    for path in [*root.glob(".tmp-*"), *root.glob(".old-*")]:
        lock = _lock(root, path.name.rpartition("-")[2])
        with suppress(OSError):  # LockTimeout is one: its maker lives
            lock.acquire(timeout=0)
            shutil.rmtree(path, ignore_errors=True)
            lock.release()
            _log.info("token_set=left_over removed=%s", path)


def _num_bytes(directory: Path) -> int:
    with suppress(OSError):  # it is renamed when it is done
        return sum(path.stat().st_size for path in directory.iterdir())
    return 0


def _key(wanted: Request, contents: str) -> str:
    key = {
        "data": contents,
        "labels": sources.labels(wanted.source),
        "format": wanted.data.format,
        "tokenizer": wanted.tokenizer_fingerprint,
        "encoder": wanted.encoder.key(),
        "code": _code_fingerprint(),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


@cache
def _code_fingerprint() -> str:
    """Of the code that turns rows into tokens: our files for it, and transformers' version."""
    digest = hashlib.sha256(f"{_FORMAT} {transformers.__version__}".encode())
    for name in ("json_line", "shapes", "calls", "sources", "examples", "templates", "tokens"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _shown(source: Source) -> str:
    return source if isinstance(source, str) else ", ".join(source)
