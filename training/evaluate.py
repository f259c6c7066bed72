"""What a model is worth on held-out examples: loss, and the quality of what it generates.

Every figure is an Estimate with a 95 % interval: exact (Clopper-Pearson) for a share of examples,
seeded bootstrap for a mean. Two models are compared on the same examples with `paired`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from scipy import stats
from transformers import PreTrainedModel

from cluster.errors import ConfigError, DataError
from training import adapter as adapters
from training import examples as data
from training import generation, objective, packing, special_ids
from training.examples import Example
from training.model import Base
from training.tokens import Encoder

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Metric: TypeAlias = Literal["loss", "exact_match", "json_valid", "rouge_l"]
METRICS: tuple[Metric, ...] = ("loss", "exact_match", "json_valid", "rouge_l")
_SHARES = ("exact_match", "json_valid")
_RESAMPLES = 9999
_SEED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Examples that it rests on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One example, what the model said, and what that is worth."""

    id: str
    prediction: str
    reference: str
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Figures, and the examples behind them."""

    metrics: Mapping[str, Estimate]
    records: tuple[Record, ...]

    def as_json(self) -> dict[str, Any]:
        """`{"metrics": {name: {"value", "low", "high", "n"}}}`."""
        return {
            "metrics": {
                name: {"value": e.value, "low": e.low, "high": e.high, "n": e.n}
                for name, e in self.metrics.items()
            }
        }

    def lines(self) -> list[str]:
        """One line a metric, for people."""
        return [
            f"{name:12} {e.value:.4f}  (95 % interval {e.low:.4f} to {e.high:.4f}, n = {e.n})"
            for name, e in self.metrics.items()
        ]


def share(successes: int, n: int) -> Estimate:
    """A proportion with its exact (Clopper-Pearson) interval."""
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    return Estimate(value=successes / n, low=float(interval.low), high=float(interval.high), n=n)


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """A (weighted) mean over examples with a bootstrap interval: the same call, the same figures.

    With one example, or where all are equal, there is nothing to resample: the interval is the
    value itself.
    """
    value_N = np.asarray(values, dtype=np.float64)
    weight_N = np.ones_like(value_N) if weights is None else np.asarray(weights, dtype=np.float64)
    assert len(value_N), "a mean of nothing"
    value = _weighted(value_N, weight_N)
    low = high = value
    if np.ptp(value_N) > 0:
        interval = stats.bootstrap(
            (value_N, weight_N),
            _weighted,
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=1000,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
        low, high = interval.low, interval.high
    return Estimate(value=float(value), low=float(low), high=float(high), n=len(value_N))


def paired(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean of `after - before` over the same examples, in the same order."""
    if len(before) != len(after):
        raise DataError(
            f"{len(before)} scores before and {len(after)} after; a paired difference needs both "
            "for the same examples"
        )
    return mean([b - a for a, b in zip(before, after, strict=True)])


def score(prediction: str, reference: str) -> dict[str, float]:
    """Exact match (after stripping), JSON validity and ROUGE-L F1 of one answer, each 0 to 1."""
    return {
        "exact_match": float(prediction.strip() == reference.strip()),
        "json_valid": float(_is_json(prediction)),
        "rouge_l": float(_rouge().score(reference, prediction)["rougeL"].fmeasure),
    }


def evaluate(
    base: Base,
    model: PreTrainedModel | PeftModel,
    held_out: Sequence[Example],
    encoder: Encoder,
    metrics: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 25,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Measure `model`, which is `base.model` or a PeftModel around it, on held-out examples.

    Answers are generated where a metric needs them, greedily. `on_progress` gets the number of
    examples answered so far. Raises ConfigError for an unknown metric, DataError without examples.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"metric {name!r} is not known; allowed: {', '.join(METRICS)}")
    if not held_out:
        raise DataError("there are no examples to evaluate on; name a file with at least one")
    figures: dict[str, Estimate] = {}
    if "loss" in metrics:
        sums, counts = losses(base, model, held_out, encoder)
        figures["loss"] = mean(np.divide(sums, counts).tolist(), counts)
    if not set(metrics) - {"loss"}:
        return Evaluation(metrics=figures, records=())
    with base.autocast():
        predictions = generation.generate(
            model,
            base.tokenizer,
            [encoder.prompt_ids(example) for example in held_out],
            max_new_tokens=max_new_tokens,
            stop_ids=encoder.stop_ids,
            batch_size=batch_size,
            pad_id=special_ids.choose_pad_id(base.tokenizer),
            on_progress=on_progress,
        )
    records: list[Record] = []
    for example, prediction in zip(held_out, predictions, strict=True):
        reference = encoder.reference(example)
        records.append(
            Record(
                id=example.id,
                prediction=prediction,
                reference=reference,
                scores=score(prediction, reference),
            )
        )
    for name in metrics:
        if name != "loss":
            figures[name] = summarise(name, [record.scores[name] for record in records])
    return Evaluation(metrics={n: figures[n] for n in metrics}, records=tuple(records))


def summarise(metric: str, values: Sequence[float]) -> Estimate:
    """The estimate of a generation metric out of its per-example scores."""
    return share(int(sum(values)), len(values)) if metric in _SHARES else mean(values)


def losses(
    base: Base, model: PreTrainedModel | PeftModel, held_out: Sequence[Example], encoder: Encoder
) -> tuple[list[float], list[int]]:
    """For each example, the sum of its tokens' cross entropies and the number of those tokens."""
    sums: list[float] = []
    counts: list[int] = []
    pad_id = special_ids.choose_pad_id(base.tokenizer)
    was_training = model.training
    model.eval()
    try:
        for example in held_out:
            encoded = encoder.encode(example)
            [batch] = packing.plan(
                [encoded], micro_batch_tokens=len(encoded.input_ids), is_packed=False, pad_id=pad_id
            )
            batch = batch.to(base.device)
            if not batch.num_supervised_tokens:
                raise DataError(f"{example.id}: nothing in it is supervised; see data.mask")
            with torch.no_grad(), base.autocast():
                position_N, target_N = objective.shifted_targets(batch)
                inputs = {"input_ids": batch.input_ids_BL}
                logits_NV = model(**inputs, use_cache=False).logits.flatten(0, 1)[position_N]
                loss = torch.nn.functional.cross_entropy(
                    logits_NV.float(), target_N, reduction="sum"
                )
            sums.append(loss.item())
            counts.append(len(target_N))
    finally:
        model.train(was_training)
    return sums, counts


def evaluate_adapter(
    adapter: str,
    source: str,
    *,
    metrics: Sequence[str] = (),
    base: str | None = None,
    max_new_tokens: int = 256,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Measure an adapter directory (or the word `base`, the bare base) on a source of examples."""
    held_out = data.read(source).examples
    loaded, model = adapters.load(adapter, base=base)
    return evaluate(
        loaded,
        model,
        held_out,
        adapters.encoder_for(adapter, loaded),
        metrics or METRICS,
        max_new_tokens=max_new_tokens,
        on_progress=on_progress,
    )


def _weighted(
    value_N: NDArray[np.float64], weight_N: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    return (value_N * weight_N).sum(axis=axis) / weight_N.sum(axis=axis)


def _is_json(text: str) -> bool:
    """Whether the whole text is one JSON object or array; NaN and Infinity are not JSON."""
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict | list)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Words:
    """Words of any script; rouge-score's own tokenizer knows a-z and 0-9 only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _rouge() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # 85 MB and a second, for answers alone

    return RougeScorer(["rougeL"], tokenizer=cast(Any, _Words()))
