"""Rows -> blocks of tokens, in this process or, where there are many rows, in several.

The blocks are the same, in the same order, whatever the number of processes. Other processes start
once a source has shown to be large; whatever goes wrong with them only costs their speed.
"""

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeAlias

from training import token_files
from training.examples import BadRow, Example
from training.token_files import Block
from training.tokens import Encoded, Encoder

Rows: TypeAlias = Sequence[Example | BadRow]

BLOCK_ROWS = 256
"""Rows encoded and written together."""
ALONE_ROWS = 32 * BLOCK_ROWS
"""Rows that are encoded here before other processes start, which takes them seconds."""
_MAX_PROCESSES = 8
"""Reading and writing rows, which one process does, keeps no more than this many busy."""

_log = logging.getLogger(__name__)
_encoder: list[Encoder] = []
"""Of a process that was started to encode."""


def blocks(
    rows: Iterable[Example | BadRow],
    encoder: Encoder,
    *,
    num_processes: int | None = None,
    alone_rows: int = ALONE_ROWS,
) -> Iterator[Block]:
    """The rows as blocks of tokens, `BLOCK_ROWS` rows each; bad rows among them pass through.

    num_processes: by default one for each CPU that this process may use, 8 at most. A few blocks
    are in memory at a time. Raises what reading the rows raises.
    """
    parts = _parts(rows)
    for part in itertools.islice(parts, alone_rows // BLOCK_ROWS):
        yield encode(part, encoder)
    first = next(parts, None)
    if first is None:
        return
    parts = itertools.chain([first], parts)
    if num_processes is None:
        num_processes = min(_num_cpus(), _MAX_PROCESSES)
    packed = _pickled(encoder) if num_processes > 1 else None
    if packed is None:
        yield from (encode(part, encoder) for part in parts)
    else:
        yield from _spread(parts, encoder, packed, num_processes)


def encode(rows: Rows, encoder: Encoder) -> Block:
    """Rows as one block; a bad row stays one, and a preference becomes two examples."""
    done: list[Encoded | BadRow] = []
    for row in rows:
        found = encoder.encode_row(row) if isinstance(row, Example) else row
        done += [found] if isinstance(found, BadRow) else found
    return token_files.pack(done)


def _parts(rows: Iterable[Example | BadRow]) -> Iterator[Rows]:
    remaining = iter(rows)
    while part := list(itertools.islice(remaining, BLOCK_ROWS)):
        yield part


def _spread(
    parts: Iterator[Rows], encoder: Encoder, packed: bytes, num_processes: int
) -> Iterator[Block]:
    """Encode parts in other processes, at most two for each on their way."""
    _log.info("tokenising_processes=%d", num_processes)
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),  # fork copies threads' locks
        initializer=_begin,
        initargs=(packed,),
    )
    left: deque[Rows] = deque()
    """Parts whose block has not been given out."""
    futures: deque[Future[Block]] = deque()
    try:
        for part in parts:
            left.append(part)
            futures.append(pool.submit(_encode_there, part))
            if len(futures) > 2 * num_processes:
                yield _next(left, futures)
        while futures:
            yield _next(left, futures)
    except BrokenProcessPool as error:
        _log.warning("tokenising_processes=lost reason=%r", str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    yield from (encode(part, encoder) for part in itertools.chain(left, parts))


def _next(left: deque[Rows], futures: deque[Future[Block]]) -> Block:
    block = futures.popleft().result()
    left.popleft()
    return block


def _num_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _pickled(encoder: Encoder) -> bytes | None:
    """What another process gets; None where a tokenizer of its own kind cannot be sent."""
    try:
        return pickle.dumps(encoder)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        _log.warning("tokenising_processes=1 reason=%r", str(error))
        return None


def _begin(packed: bytes) -> None:
    """Make a started process ready; it ends with the one that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    starter = multiprocessing.parent_process()
    assert starter is not None
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    _encoder.append(pickle.loads(packed))  # noqa: S301  (from the process that started this one)


def _end_with(starter: BaseProcess) -> None:
    starter.join()
    os._exit(1)


def _encode_there(rows: Rows) -> Block:
    return encode(rows, _encoder[0])
