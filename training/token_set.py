"""Many encoded examples in flat arrays, and the cache file they are kept in between runs."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Literal, overload

import numpy as np
import safetensors
import safetensors.numpy
import transformers
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import LorayError
from training import examples
from training import tokens as tokens_room
from training.config import DataConfig
from training.examples import BadRow, Rows, Source
from training.tokens import IGNORE, Encoded, Encoder

_CACHE_FORMAT = "1"
_log = logging.getLogger(__name__)


class TokenSet(Sequence[Encoded]):
    """Many encoded examples in flat arrays: 8 bytes a token and about 100 an example."""

    def __init__(self, encoded: Iterable[Encoded], *, bad: Sequence[BadRow] = ()) -> None:
        items = list(encoded)
        nothing = np.zeros(0, np.int32)
        self.ids = np.concatenate([nothing, *(item.input_ids for item in items)])
        """(T,) int32, all examples end to end."""
        self.labels = np.concatenate([nothing, *(item.labels for item in items)])
        """(T,) int32."""
        self.offsets = np.cumsum([0, *(len(item.input_ids) for item in items)], dtype=np.int64)
        """(N + 1,) int64; example i is offsets[i] to offsets[i + 1]."""
        self.is_truncated = np.array([item.is_truncated for item in items], dtype=np.bool_)
        """(N,)."""
        self.has_end = np.array([item.has_end for item in items], dtype=np.bool_)
        """(N,)."""
        self.names = [item.id for item in items]
        """N example ids."""
        self.bad = tuple(bad)
        """Rows that were left out."""

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return Encoded(
            id=self.names[i],
            input_ids=self.ids[start:stop],
            labels=self.labels[start:stop],
            is_truncated=bool(self.is_truncated[i]),
            has_end=bool(self.has_end[i]),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each example."""
        return np.diff(self.offsets)

    @property
    def num_supervised(self) -> int:
        """Tokens that are to be predicted, in all examples."""
        return int((self.labels != IGNORE).sum())

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over ids, labels and offsets."""
        digest = hashlib.sha256()
        for array in (self.ids, self.labels, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()


def tokenize(
    rows: Rows, encoder: Encoder, *, on_bad_row: Literal["error", "skip"] = "error"
) -> TokenSet:
    """Encode all examples; with "error", raises DataError where one cannot be learned from."""
    good: list[Encoded] = []
    bad = list(rows.bad)
    for example in rows.examples:
        encoded = encoder.try_encode(example)
        if isinstance(encoded, Encoded):
            good.append(encoded)
        else:
            bad.append(encoded)
    if bad and on_bad_row == "error":
        raise examples.bad_rows_error(bad, num_rows=len(good) + len(bad))
    return TokenSet(good, bad=bad)


def load(
    source: Source,
    *,
    data: DataConfig,
    encoder: Encoder,
    tokenizer_fingerprint: str,
    cache_dir: Path | None = None,
) -> TokenSet:
    """The tokens of a source, out of the cache where it holds them undamaged.

    The cache file is `<cache_dir>/tokens/<key>.safetensors`; the key covers the contents and names
    of the source, the tokenizer, the encoder's settings and the code. Raises DataError as
    `examples.read` and `tokenize` do, whether or not the cache was used.
    """
    key = {
        "data": examples.fingerprint(source),
        "labels": examples.labels(source),
        "format": data.format,
        "tokenizer": tokenizer_fingerprint,
        "encoder": encoder.key(),
        "code": _code_fingerprint(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = _cache_root(cache_dir) / f"{name}.safetensors"
    found = _read_cache(path)
    if found is not None:
        if found.bad and data.on_bad_row == "error":
            raise examples.bad_rows_error(found.bad, num_rows=len(found) + len(found.bad))
        return found
    rows = examples.read(source, format=data.format, on_bad_row=data.on_bad_row)
    tokens = tokenize(rows, encoder, on_bad_row=data.on_bad_row)
    if len(tokens) and rows.fingerprint == key["data"]:
        _write_cache(path, tokens)
    return tokens


def _cache_root(directory: Path | None) -> Path:
    return (directory or storage.cache_dir()) / "tokens"


def _write_cache(path: Path, tokens: TokenSet) -> None:
    about = {"names": tokens.names, "bad": [asdict(row) for row in tokens.bad]}
    arrays: dict[str, NDArray[np.generic]] = {
        "ids": tokens.ids,
        "labels": tokens.labels,
        "offsets": tokens.offsets,
        "is_truncated": tokens.is_truncated,
        "has_end": tokens.has_end,
        "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
    }
    metadata = {"format": _CACHE_FORMAT, "sha256": _checksum(arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_file(path, safetensors.numpy.save(arrays, metadata))
    except (LorayError, OSError) as error:  # The next run will be slower, not wrong.
        _log.warning("token_cache_not_written=%s error=%r", path, str(error))


def _read_cache(path: Path) -> TokenSet | None:
    """The token set in a cache file; None where there is none, or it is not what was written."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        if metadata.get("sha256") != _checksum(arrays):
            raise ValueError("the checksum does not match")
        about = json.loads(arrays["about"].tobytes())
        tokens = TokenSet((), bad=[BadRow(**row) for row in about["bad"]])
        tokens.ids, tokens.labels = arrays["ids"], arrays["labels"]
        tokens.offsets, tokens.names = arrays["offsets"], about["names"]
        tokens.is_truncated, tokens.has_end = arrays["is_truncated"], arrays["has_end"]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        _log.warning("token_cache_rebuilt=%s reason=%r", path, str(error))
        return None
    return tokens


def _checksum(arrays: dict[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@cache
def _code_fingerprint() -> str:
    """Of the code that turns rows into tokens: two of our files, and transformers' version."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {transformers.__version__}".encode())
    for path in (examples.__file__, tokens_room.__file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
