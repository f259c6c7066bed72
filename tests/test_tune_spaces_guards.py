"""What ends a trial early on its own account, and what is kept of it."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import make_recipe

from cluster import config, storage
from cluster.errors import ConfigError
from training.checkpoint import is_export_of
from tune_spaces import config as search_config
from tune_spaces import trial as trial_room
from tune_spaces.actor import BenchActor
from tune_spaces.guards import Guards, Report, Verdict, best, judge
from tune_spaces.trial import SeatTrial, Spec


def reports(
    eval_losses: Sequence[float | None],
    train_losses: Sequence[float] = (),
    values: Sequence[float] = (),
) -> list[Report]:
    """A report every ten steps and hundred tokens."""
    return [
        Report(
            step=10 * number,
            tokens=100 * number,
            train_loss=train_losses[number - 1] if train_losses else 1.0,
            eval_loss=loss,
            value=values[number - 1] if values else math.nan if loss is None else loss,
        )
        for number, loss in enumerate(eval_losses, 1)
    ]


def verdict(
    seen: Sequence[Report], guards: Guards | None = None, *, warmup: int = 0, **fields: Any
) -> Verdict | None:
    return judge(
        guards or Guards(),
        seen,
        warmup_steps=warmup,
        **{"metric": "eval_loss", "base_loss": 4.0, **fields},
    )


RISING = (3.0, 2.0, 2.1, 2.2, 2.3)
FALLING = (3.0, 2.0, 1.5, 1.2, 1.0)


@pytest.mark.parametrize("loss", [6.1, math.inf, math.nan])
def test_a_loss_far_above_the_base_s_is_a_divergence_after_warm_up_only(loss: float) -> None:
    seen = reports([5.9, loss])
    assert verdict(seen[:1]) is None
    found = verdict(seen)
    assert found is not None
    assert found.reason.startswith("diverged: eval loss")
    assert found.kept is None
    assert verdict(seen, warmup=20) is None
    assert verdict(seen, warmup=19) is not None
    assert verdict(seen, Guards(divergence=None)) is None
    assert verdict(seen, base_loss=None) is None


def test_overfitting_is_a_gap_that_stays_open_and_keeps_the_best_report() -> None:
    seen = reports(RISING, FALLING)
    assert verdict(seen[:4]) is None  # only two reports of it
    found = verdict(seen)
    assert found is not None
    assert found.kept == seen[1]
    assert found.reason == (
        "overfit: eval loss 2.300 after 2.000 while the training loss fell from 2.000 to 1.000; "
        "the report at 200 supervised tokens counts"
    )
    assert verdict(seen, Guards(overfit_patience=None)) is None
    assert verdict(seen, Guards(overfit_margin=0.2)) is None
    assert verdict(seen, warmup=30) is None  # of the three reports two are after warm-up


def test_a_worse_evaluation_loss_is_no_overfitting_while_the_training_loss_rises_too() -> None:
    assert verdict(reports(RISING, (1.0, 1.0, 1.1, 1.2, 1.3))) is None


def test_a_metric_that_still_gains_is_worth_more_than_the_loss() -> None:
    seen = reports(RISING, FALLING, values=(0.1, 0.2, 0.2, 0.3, 0.3))
    assert verdict(seen, metric="exact_match") is None
    assert verdict(seen, metric="train_loss") is not None  # `value` is given: 0.1 is its best
    own = [report.train_loss for report in seen]
    assert verdict(reports(RISING, FALLING, values=own), metric="train_loss") is None


def test_a_plateau_is_no_gain_in_the_metric_or_the_loss() -> None:
    flat = (3.0, 2.0, 1.999, 1.9995, 2.001, 1.9985)
    found = verdict(reports(flat))
    assert found is not None
    assert found.reason == (
        "plateau: no gain in 4 reports; the report at 600 supervised tokens counts"
    )
    assert verdict(reports(flat[:-1])) is None
    assert verdict(reports((*flat[:-1], 1.99))) is None
    assert verdict(reports(flat), Guards(plateau_patience=None)) is None
    assert verdict(reports(flat), Guards(plateau_gain=0.0)) is None
    assert verdict(reports(flat), warmup=20) is None
    still = [0.0] * 6
    assert verdict(reports((3, 2, 1.9, 1.8, 1.7, 1.6), (), still), metric="rouge_l") is None
    assert verdict(reports([2.0] * 6, (), still), metric="rouge_l") is not None
    trained = (3.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    found = verdict(reports([None] * 6, trained, trained), metric="train_loss", base_loss=None)
    assert found is not None


def test_the_best_report_is_the_one_with_the_best_metric_then_the_lowest_loss() -> None:
    seen = reports((3.0, 2.0, 2.5), values=(0.0, 0.5, 0.5))
    assert best(seen, "max") == seen[1]
    assert best(seen, "min") == seen[0]
    assert best(reports([math.nan]), "min") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("search.guards.divergence=0.5", "search.guards.divergence is 0.5; allowed: 1 to 1e"),
        ("search.guards.overfit_patience=0", "allowed: 1 to 10000, or null for never"),
        ("search.guards.overfit_margin=null", "allowed: a number"),
        ("search.guards.overfit=3", "Did you mean 'overfit_margin'"),
        ("search.guards.plateau_gain=2", "search.guards.plateau_gain is 2"),
        ("search.guards.overfit_patience=5", "solo keeps no earlier report"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, words: str, message: str) -> None:
    file = tmp_path / "s.json"
    tree = {"name": "s", "model": {"base": "demo"}, "data": {"train": "a", "eval": "b"}}
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        search_config.load(file, [words, *(["search.mode=solo"] if "=5" in words else [])])
    chosen = search_config.load(file, ["search.guards.plateau_patience=null"])
    assert chosen.search.guards == Guards(plateau_patience=None)


class Handle:
    """A bench without Ray: each method has a `remote` that does the work at once."""

    def __init__(self, actor: BenchActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


@pytest.fixture
def seat_trial(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], SeatTrial]]:
    """Makes one process after another of a trial that learns what is half wrong elsewhere."""
    for name, word in (("train", "red"), ("eval", "owl")):
        rows = [{"prompt": f"Say {n}", "completion": f"it is {word}"} for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        data={"eval": str(tmp_path / "eval.jsonl"), "max_length": 128},
        lora={"rank": 16},
        optim={"learning_rate": 3e-2, "max_steps": 400, "global_batch_size": 8},
    )
    actor = BenchActor(
        config.plain(recipe),
        str(tmp_path),
        largest=config.plain(recipe),
        seats=1,
        most=1,
        threads=1,
        fill_window_s=0,
        name="bench0",
    )
    monkeypatch.setattr(trial_room.ray, "get_actor", lambda *_, **__: Handle(actor))
    monkeypatch.setattr(trial_room.ray, "get", lambda value, timeout: value)
    tokens = actor.size()[1]
    spec = Spec(
        recipe=config.plain(recipe),
        directory=str(tmp_path / "trials"),
        namespace="n",
        benches=("bench0",),
        metric="eval_loss",
        is_lr_scaled=True,
        report_every=10 * tokens,
        budget=None,
        tokens_per_example=tokens / 8,
        base_loss=actor.base_loss(),
        guards={"overfit_margin": 5e-4, "plateau_patience": None},
    )
    file = tmp_path / "spec.json"
    storage.write_file(file, json.dumps(config.plain(spec)).encode())
    yield lambda: SeatTrial({"spec": str(file), "params": {}})
    actor._desk.close()
    actor._log.close()


def test_an_overfitted_trial_ends_with_the_adapter_of_its_best_report(
    tmp_path: Path, seat_trial: Callable[[], SeatTrial]
) -> None:
    process = seat_trial()
    results = [process.step()]
    run_dir = tmp_path / "trials" / process._name
    while not results[-1]["done"]:
        if len(results) == 2:  # it dies, and with it what it had not committed
            process = seat_trial()
        results.append(process.step())
        assert len(results) < 30, [result["eval_loss"] for result in results]
    last = results[-1]
    losses = [result.get("measured", result["eval_loss"]) for result in results]
    lowest = losses.index(min(losses))
    assert last["reason"].startswith("overfit: ")
    assert last["is_finished"]
    assert (last["eval_loss"], last["measured"]) == (losses[lowest], losses[-1])
    assert last["kept_step"] == results[lowest]["step"] < last["step"]
    told = [report["step"] for report in json.loads((run_dir / "reports.json").read_text())]
    assert told == sorted({result["step"] for result in results})
    newest = max((run_dir / "checkpoints").iterdir())
    assert newest.name == f"step-{last['kept_step']:06d}"
    assert is_export_of(run_dir / "adapter", newest)
    storage.verify(run_dir / "adapter")
    own = process._call("scores", [process._name], "eval_loss", None)[process._name]
    mean = sum(v * w for v, w in zip(own["values"], own["weights"], strict=True))
    assert mean / sum(own["weights"]) == pytest.approx(losses[lowest], abs=1e-4)


def test_what_a_trial_is_given_of_another_begins_a_new_history(
    tmp_path: Path, seat_trial: Callable[[], SeatTrial]
) -> None:
    process = seat_trial()
    process.step()
    process.step()
    assert len(process._reports) == 2
    note = tmp_path / "note"
    note.mkdir()
    source = tmp_path / "trials" / "other"
    shutil.copytree(process._run_dir / "checkpoints", source / "checkpoints")
    (note / "seat.json").write_text(json.dumps({"trial": "other", "run_dir": str(source)}))
    process.load_checkpoint(str(note))
    assert process._reports == []
    assert process.step()["reason"] == ""
    assert len(json.loads((process._run_dir / "reports.json").read_text())) == 1


def test_a_trial_that_lost_its_last_reports_sees_them_again(
    seat_trial: Callable[[], SeatTrial],
) -> None:
    process = seat_trial()
    first = process.step()
    process.step()
    shutil.rmtree(max((process._run_dir / "checkpoints").iterdir()))
    again = seat_trial()
    assert [report.step for report in again._reports] == [first["step"]]
