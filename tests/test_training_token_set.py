"""Token sets: what went in comes out, and no process holds them in its memory."""

import hashlib
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from cluster.errors import DataError, StorageError
from training import token_files
from training.examples import BadRow, Example, Message, Rows
from training.special_ids import stop_ids
from training.token_files import Block, pack
from training.token_set import TokenSet, tokenize
from training.tokens import IGNORE, Encoded, Encoder


def chat(prompt: str, answer: str) -> Example:
    turns = Message(role="user", content=prompt), Message(role="assistant", content=answer)
    return Example(id="train.jsonl:1", messages=turns)


def encoder(max_length: int = 1024) -> Encoder:
    tokenizer = byte_tokenizer()
    return Encoder(tokenizer, max_length=max_length, stop_ids=stop_ids(tokenizer, None))


def encoded(number: int, length: int) -> Encoded:
    ids = np.arange(number, number + length, dtype=np.int32)
    labels = np.where(ids % 3 == 0, ids, IGNORE).astype(np.int32)
    return Encoded(
        id=f"tröin.jsonl:{number}",
        input_ids=ids,
        labels=labels,
        is_truncated=number % 2 == 0,
        has_end=number % 3 == 0,
    )


def written(directory: Path, items: list[Encoded], block: int = 3, piece: int = 40) -> TokenSet:
    parts = [items[i : i + block] for i in range(0, len(items), block)]
    token_files.write(directory, map(pack, parts), piece_tokens=piece)
    return TokenSet(directory)


def random_blocks(num_blocks: int, rows: int = 1000, length: int = 250) -> Iterator[Block]:
    """Made as they are asked for: 250,000 tokens a block, which are 2 MB in files."""
    ids = np.arange(rows * length, dtype=np.int32)
    for number in range(num_blocks):
        yield Block(
            ids=ids,
            labels=ids,
            lengths=np.full(rows, length, np.int64),
            supervised=np.full(rows, length - 1, np.int32),
            flags=np.zeros(rows, np.uint8),
            names=tuple(f"big.jsonl:{number * rows + i}".encode() for i in range(rows)),
            bad=(),
        )


def test_a_token_set_gives_back_what_went_in(tmp_path: Path) -> None:
    items = [encoded(number, 1 + number % 7) for number in range(50)]
    tokens = written(tmp_path, items)
    assert len(tokens) == 50
    assert len(tokens.facts.pieces) > 3
    for before, after in zip(items, tokens, strict=True):
        assert after.id == before.id
        assert after.input_ids.tolist() == before.input_ids.tolist()
        assert after.labels.tolist() == before.labels.tolist()
        assert after.num_supervised == before.num_supervised
        assert (after.is_truncated, after.has_end) == (before.is_truncated, before.has_end)
    assert tokens[-1].id == items[-1].id
    assert [item.id for item in tokens[48:]] == [items[48].id, items[49].id]
    assert tokens.lengths.tolist() == [len(item.input_ids) for item in items]
    assert tokens.num_supervised == sum(item.num_supervised for item in items)
    with pytest.raises(IndexError):
        tokens[50]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, block=st.integers(1, 12), piece=st.integers(1, 60))
def test_facts_do_not_depend_on_blocks_and_pieces(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, piece: int
) -> None:
    items = [encoded(number, length) for number, length in enumerate(lengths)]
    facts = written(tmp_path_factory.mktemp("set"), items, block, piece).facts
    ids = np.concatenate([item.input_ids for item in items])
    labels = np.concatenate([item.labels for item in items])
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    digest = hashlib.sha256(ids.tobytes() + labels.tobytes() + offsets.tobytes())
    assert facts.fingerprint == digest.hexdigest()  # as runs of earlier versions have stored it
    for name, percent in {"p50": 50, "p90": 90, "p99": 99, "max": 100}.items():
        expected = np.percentile(lengths, percent, method="higher")
        assert facts.length_percentiles[name] == expected
    assert facts.typical == lengths.index(sorted(lengths)[(len(lengths) - 1) // 2])
    assert facts.num_tokens == len(ids)
    assert facts.num_supervised == (labels != IGNORE).sum()
    assert facts.num_truncated == sum(item.is_truncated for item in items)
    whole = [item for item in items if not item.is_truncated]
    assert facts.num_without_end == sum(not item.has_end for item in whole)
    assert facts.largest_id == ids.max()


def test_the_fingerprint_is_the_one_that_was_recorded() -> None:
    tokens = tokenize(Rows(examples=(chat("Hi", "Hello"),), bad=(), fingerprint=""), encoder())
    # By version 0.1, which kept the arrays in memory.
    assert tokens.fingerprint == "6c40ce269a5dbc41e22e52ed3c514baea6e542f2e49d252704dc1f0bf0f46e3b"


def test_rows_that_cannot_be_encoded_follow_on_bad_row() -> None:
    rows = Rows(examples=(chat("Hi", "Hello"), chat("x" * 50, "y")), bad=(), fingerprint="")
    with pytest.raises(DataError, match=r"1 of 2 rows are bad.*\n.*beyond max_length 60"):
        tokenize(rows, encoder(max_length=60))
    kept = tokenize(rows, encoder(max_length=60), on_bad_row="skip")
    assert (len(kept), kept.facts.num_bad, len(kept.facts.bad)) == (1, 1, 1)


def test_bad_rows_are_kept_up_to_a_bound_and_all_counted(tmp_path: Path) -> None:
    bad = [BadRow(where=f"a:{i}", reason="r") for i in range(500)]
    facts = token_files.write(tmp_path, [pack([*bad[:200], encoded(1, 3)]), pack(bad[200:])])
    assert facts.num_bad == 500
    assert facts.bad == tuple(bad[:100])


def test_a_set_without_examples_can_be_opened(tmp_path: Path) -> None:
    tokens = written(tmp_path, [])
    assert (len(tokens), tokens.longest, list(tokens)) == (0, 0, [])


def test_ids_outside_a_vocabulary_are_counted(tmp_path: Path) -> None:
    tokens = written(tmp_path, [encoded(-2, 4), encoded(8, 4)])
    assert tokens.num_outside(12) == 2
    assert tokens.num_outside(10) == 4


@pytest.mark.parametrize("name", ["ids-00001.i4", "offsets.i8", "names.u1", "facts.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_that_is_cut_or_gone_is_told(tmp_path: Path, name: str, damage: str) -> None:
    written(tmp_path, [encoded(number, 9) for number in range(12)])
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=name):
        TokenSet(tmp_path)


def test_writing_holds_a_block_in_memory_and_not_the_set(tmp_path: Path) -> None:
    tracemalloc.start()
    facts = token_files.write(tmp_path, random_blocks(40), piece_tokens=3 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts.num_tokens == 10_000_000  # 80 MB
    assert len(facts.pieces) == 4
    assert peak < 12e6


OPEN = """
import sys, psutil
from pathlib import Path
from training.token_set import TokenSet
me = psutil.Process()
before = me.memory_full_info().uss
tokens = TokenSet(Path(sys.argv[1]))
size = len(tokens)
peak = total = 0
for start in range(0, size, 997):
    for i in range(start, start + 16):
        example = tokens[i * 7919 % size]
        total += int(example.input_ids.sum()) + int(example.labels.sum())
    peak = max(peak, me.memory_full_info().uss - before)
print(peak)
"""


def test_a_process_that_reads_a_large_set_holds_little_of_it(tmp_path: Path) -> None:
    token_files.write(tmp_path, random_blocks(100))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.1 * size


SHARE = """
import os, sys
from pathlib import Path
from training.sampler import share
from training.token_set import TokenSet
tokens = TokenSet(Path(sys.argv[1]))
for path in Path(sys.argv[1]).glob("*-00001.i4"):
    os.truncate(path, 0)  # who looks at a token there is killed by SIGBUS
batch = [tokens[i] for i in (0, 20, 1, 21)]
print(sum(e.num_supervised for e in batch), sum(len(e.input_ids) for e in batch), flush=True)
assert all(int(e.input_ids.sum()) > 0 for e in share(batch, 0, 2))
print("mine are read", flush=True)
int(share(batch, 1, 2)[0].input_ids.sum())
"""


def test_the_tokens_of_other_workers_examples_are_not_looked_at(tmp_path: Path) -> None:
    items = [encoded(number, 5) for number in range(1, 31)]
    tokens = written(tmp_path, items, block=10, piece=100)
    assert tokens.facts.pieces == (0, 20)
    batch = [tokens[i] for i in (0, 20, 1, 21)]
    expected = f"{sum(e.num_supervised for e in batch)} 20\nmine are read\n"
    command = [sys.executable, "-c", SHARE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == expected, done.stderr
    assert done.returncode == -signal.SIGBUS


def test_a_set_in_memory_leaves_no_files_behind() -> None:
    rows = Rows(examples=(chat("Hi", "Hello"),), bad=(), fingerprint="")
    tokens = tokenize(rows, encoder())
    assert tokens[0].num_supervised == 6
    assert not tokens.directory.exists()
    assert not any("loray-tokens" in f.path for f in psutil.Process().open_files())
