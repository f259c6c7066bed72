"""A recipe's examples as tokens, in the order in which they are trained."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cluster import remote, session, storage
from training import examples, exchange, inspection, sampler, special_ids, token_cache, token_set
from training.config import TrainRecipe
from training.examples import BadRow, Example, Rows
from training.model import tokenizer_fingerprint
from training.strategy import Workers
from training.token_set import TokenSet
from training.tokens import Encoded, Encoder

_HEAD_ROWS = 512
"""Rows of a stream that are looked at before training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a driver tells its workers of the data, so that they need not read the files again."""

    fingerprint: str
    """See `Dataset`."""
    train: str | None = None
    """Key of the token set; None for a stream."""
    eval: str | None = None
    """Key of the token set; None without evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a run trains and is evaluated on."""

    encoder: Encoder
    train: TokenSet | None
    """None for a stream, which is never whole in memory."""
    eval: TokenSet | None
    report: inspection.DataReport
    """Of all training examples, or of the first rows of a stream."""

    @property
    def fingerprint(self) -> str:
        """Identifies the training examples as tokens; `stream` for a stream."""
        return self.train.fingerprint if self.train is not None else "stream"

    @property
    def seen(self) -> Seen:
        """What workers are told of it."""
        train, held_out = (
            None if tokens is None else tokens.directory.name for tokens in (self.train, self.eval)
        )
        return Seen(fingerprint=self.fingerprint, train=train, eval=held_out)


class SetBatches:
    """Global batches out of a token set, in the sampler's order.

    The tokens of an example are read where they are looked at, so a worker reads its share alone.
    A preference is two examples of the set, which stay together.
    """

    def __init__(self, train: TokenSet, recipe: TrainRecipe) -> None:
        self._train = train
        self._together = recipe.objective.num_sequences
        self._order = sampler.Order(
            len(train) // self._together,
            recipe.optim.global_batch_size,
            recipe.optim.seed,
            epochs=recipe.optim.epochs,
            max_steps=recipe.optim.max_steps,
        )
        self.num_steps: int = self._order.num_steps

    def batch(self, step: int) -> Sequence[tuple[int, Encoded]]:
        """The global batch of 0-based `step`: (index of the example, its tokens)."""
        indices = [
            first * self._together + i
            for first in self._order.batch(step)
            for i in range(self._together)
        ]
        return [(index, self._train[index]) for index in indices]


class StreamBatches:
    """Global batches out of a stream, read from front to back; a resume reads up to its step.

    Every worker reads all rows, tokenises its part of them, and is told the others' tokens.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        encoder: Encoder,
        *,
        workers: Workers | None = None,
        device: torch.device | None = None,
    ) -> None:
        assert recipe.optim.max_steps is not None, "TrainRecipe wants max_steps for a stream"
        self._size = recipe.optim.global_batch_size
        self._next = 0
        self._order = sampler.StreamOrder(
            recipe.data.train,
            exchange.Encoders(
                encoder=encoder,
                workers=workers or Workers(),
                device=device or torch.device("cpu"),
            ),
            global_batch_size=self._size,
            seed=recipe.optim.seed,
            max_steps=recipe.optim.max_steps,
            format=recipe.data.format,
            on_bad_row=recipe.data.on_bad_row,
        )
        self.num_steps: int = self._order.num_steps

    def batch(self, step: int) -> Sequence[tuple[int, Encoded]]:
        """The global batch of 0-based `step`: (place of the example in the stream, its tokens)."""
        if step != self._next:
            self._order.skip(step)
        self._next = step + 1
        return list(enumerate(next(self._order), start=step * self._size))


def make_encoder(
    recipe: TrainRecipe,
    tokenizer: PreTrainedTokenizerBase,
    generation_eos: int | list[int] | None,
) -> Encoder:
    """The recipe's way from an example to ids and labels."""
    return Encoder(
        tokenizer,
        template=recipe.data.template,
        mask=recipe.data.mask,
        max_length=recipe.data.max_length,
        stop_ids=special_ids.stop_ids(tokenizer, generation_eos),
    )


def load(
    recipe: TrainRecipe,
    tokenizer: PreTrainedTokenizerBase,
    generation_eos: int | list[int] | None,
    *,
    vocab_size: int,
    seen: Seen | None = None,
) -> Dataset:
    """Read, tokenise (or take from the token cache) and inspect the recipe's examples.

    vocab_size: rows of the model's embedding. seen: by the driver, whose token sets are taken as
    they are. Raises DataError for data that cannot be trained on, and as `token_cache.load` does.
    """
    known = seen or Seen(fingerprint="")
    encoder = make_encoder(recipe, tokenizer, generation_eos)
    is_stream = recipe.data.streaming
    train = None if is_stream else _load(recipe, recipe.data.train, encoder, tokenizer, known.train)
    shown = train if train is not None else _head(recipe, encoder)
    report = inspection.inspect(
        shown,
        encoder,
        tokenizer,
        vocab_size=vocab_size,
        num_sequences=recipe.objective.num_sequences,
    )
    inspection.refuse(report)
    held_out = _load(recipe, recipe.data.eval, encoder, tokenizer, known.eval)
    return Dataset(encoder=encoder, train=train, eval=held_out, report=report)


def _head(recipe: TrainRecipe, encoder: Encoder) -> TokenSet:
    """The first rows of a stream, to look at before training."""
    stream = examples.stream(recipe.data.train, format=recipe.data.format)
    rows = list(itertools.islice(stream, _HEAD_ROWS))
    good = tuple(row for row in rows if isinstance(row, Example))
    bad = tuple(row for row in rows if isinstance(row, BadRow))
    if bad and recipe.data.on_bad_row == "error":
        raise examples.bad_rows_error(bad, num_bad=len(bad), num_rows=len(rows))
    return token_set.tokenize(
        Rows(examples=good, bad=bad, fingerprint=""), encoder, on_bad_row=recipe.data.on_bad_row
    )


def _load(
    recipe: TrainRecipe,
    source: str | tuple[str, ...] | None,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    known: str | None,
) -> TokenSet | None:
    if source is None:
        return None
    wanted = token_cache.Request(
        source=source,
        data=replace(recipe.data, format=recipe.row_format),
        encoder=encoder,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    return token_cache.load(wanted, token_roots(recipe), known=known)


def token_roots(recipe: TrainRecipe) -> tuple[Path, ...]:
    """Where a recipe's token sets are: beside its runs, or on this machine alone."""
    here = storage.cache_dir() / "tokens"
    if remote.is_url(recipe.storage):  # files are mapped; each machine makes its own
        return (here,)
    return session.storage_root(recipe.storage) / ".tokens", here
