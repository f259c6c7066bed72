"""The driver of a search: benches, Ray Tune over them, finalists, and what it leaves behind.

`<storage>/<name>/` is the whole story: config.json (the search file), search.json and trials.jsonl
(the record), trials/<id>/ (checkpoints and adapter of each), tune-<stage>/ (Ray Tune's own state),
study.journal (Optuna's), best/, best.yaml, trials.csv and report.html.
"""

import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig

from cluster import config, ownership, session, storage
from cluster.errors import ConfigError, TrainingError
from training import run, worker
from training.config import TrainRecipe
from training.evaluate import Estimate
from training.events import EventLog, EventReader, telling_of_failure
from tune_spaces import config as search_config
from tune_spaces import decades, finals, loggers, report, results, spaces
from tune_spaces import record as records
from tune_spaces.config import Search
from tune_spaces.hall import AnyHall, Hall
from tune_spaces.record import SearchRecord
from tune_spaces.results import Recorder, Trials, Watcher
from tune_spaces.schedulers import (
    POPULATION,
    TOKENS,
    make_scheduler,
    make_searcher,
    mode_of,
    population,
)
from tune_spaces.searcher import OptunaSearcher
from tune_spaces.solo_hall import SoloHall
from tune_spaces.spaces import Space
from tune_spaces.trial import Spec

_SPEC = "spec.json"
_REPORTS = 8
"""Reports of a trial, unless search.report_every_tokens says otherwise."""
_READY_TIMEOUT_S = 900.0
_MAX_FAILURES = 3
_LEAST_MINUTES = 0.01
"""Of a stage that begins when the search's time is over."""
_CHANGEABLE = ("storage", "search.budget_minutes", "checkpoint.", "log.")
"""Settings that a resumed search may change."""
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a search has its own records
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Ctrl-C would end the trials, and the finals begin
}


def search(
    chosen: Search,
    *,
    say: Callable[[str], None],
    watch: Watcher,
    address: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run a search to its end; the object that `--json` prints.

    say: told what a person should read. watch: told each result of a trial. resume: go on in a
    directory that an earlier search with the same file left. Raises LorayError.
    """
    started = time.perf_counter()
    root = session.storage_root(chosen.recipe.storage)
    directory = root / chosen.recipe.name
    recipe = worker.with_absolute_paths(replace(chosen.recipe, storage=str(root)))
    for space in chosen.space.stages or (chosen.space,):
        make_scheduler(chosen.search, space, budget=2, report=1)  # refuses before Ray is started
    loggers.require(chosen.search)
    storage.make_directory(directory)
    with ownership.RunLock(directory), telling_of_failure(directory / "events.jsonl"):
        _claim(directory, chosen, resume=resume)
        if (directory / records.RESULT).exists():
            say(f"this search is complete: {report.answer(records.read(directory))}")
            return json.loads((directory / records.RESULT).read_text(encoding="utf-8"))
        run.inspect(recipe, say)
        for warning in spaces.warnings_for(chosen.space, recipe):
            say(f"warning: {warning}")
        with session.connect(address) as ray_session:
            say(f"search directory {directory}")
            say(f"{ray_session}; loading the base")
            hall = _open(chosen, recipe, directory, say)
            try:
                return _search(chosen, recipe, directory, hall, say, watch, started)
            finally:
                hall.close()


def _search(
    chosen: Search,
    recipe: TrainRecipe,
    directory: Path,
    hall: AnyHall,
    say: Callable[[str], None],
    watch: Watcher,
    started: float,
) -> dict[str, Any]:
    metric = chosen.search.metric
    mode = mode_of(metric)
    base = None if metric == "train_loss" else finals.base_estimate(hall, metric, recipe)
    if base is not None:
        say(f"{metric} of the base model: {base.value:.4f} ({base.low:.4f} to {base.high:.4f})")
    budget, spec = _spec(chosen, recipe, directory, hall, base)
    trials = Trials()
    reader = EventReader(directory / "events.jsonl")
    for event in reader.read():  # of the driver that this one goes on for
        trials.note(event)

    def read() -> None:
        for event in reader.read():
            trials.note(event)
            watch(event)

    best: dict[str, Any] = {}
    is_new = not trials.last
    tuning = time.perf_counter()
    with closing(EventLog(directory / "events.jsonl")) as events:
        events.write("started", metric=metric, trials=chosen.search.trials, budget=budget)
        recorder = Recorder(events, read, metric=metric, scheduler=chosen.search.scheduler)
        for number, space in enumerate(chosen.space.stages or (chosen.space,)):
            timed = _in_time(chosen, started)
            _tune(timed, space, number, directory, hall, spec, budget, best, recorder)
            leaders = finals.finished(trials.last, mode)
            best = dict(trials.params[leaders[0]]) if leaders else best
    tuned_s = time.perf_counter() - tuning if is_new else None
    hall.clear()
    filled = hall.occupancy()
    outcome = finals.decide(chosen, spec, hall, trials.last, trials.params, mode=mode, say=say)
    record = results.record_of(
        chosen, hall, spec, budget, base, trials, outcome, filled, tuned_s, started
    )
    records.write(directory, record)
    say(report.answer(record))
    if outcome is not None:
        _keep_best(directory, outcome)
    say(f"report {report.write(directory)}")
    if outcome is None:
        reasons = sorted({trial.reason for trial in record.trials if trial.reason})
        raise TrainingError(
            f"no trial finished: {'; '.join(reasons) or 'none was started'}. Lower the learning "
            f"rates of the space, or raise search.budget_tokens; see {directory / 'report.html'}"
        )
    result = _result(directory, record, outcome, hall, trials, started)
    storage.write_file(directory / records.RESULT, json.dumps(result, indent=1).encode())
    return result


def _in_time(chosen: Search, started: float) -> Search:
    """A search whose limit is what is left of its time; started: on time.perf_counter."""
    minutes = chosen.search.budget_minutes
    if minutes is None:
        return chosen
    left = max(_LEAST_MINUTES, minutes - (time.perf_counter() - started) / 60)
    return replace(chosen, search=replace(chosen.search, budget_minutes=left))


def _open(
    chosen: Search, recipe: TrainRecipe, directory: Path, say: Callable[[str], None]
) -> AnyHall:
    search = chosen.search
    if search.mode == "solo":
        wanted = None if search.seats == "auto" else search.seats
        return SoloHall.open(
            recipe, directory, space=chosen.space, wanted=wanted, trials=search.trials
        )
    hall = Hall.open(
        recipe,
        directory,
        largest=spaces.largest(chosen.space, recipe),
        seats=search.seats,
        most=search.trials,
        fill_window_s=search.fill_window_s,
        timeout_s=_READY_TIMEOUT_S,
    )
    for name, capacity in zip(hall.names, hall.capacities, strict=True):
        say(f"{name}: {capacity}")
    return hall


def _spec(
    chosen: Search, recipe: TrainRecipe, directory: Path, hall: AnyHall, base: Estimate | None
) -> tuple[int, Spec]:
    """The supervised tokens of a trial, and what trials share, which they read from a file."""
    num_examples, num_supervised = hall.size()
    per_example = num_supervised / num_examples
    optim = recipe.optim
    examples = (
        optim.max_steps * optim.global_batch_size
        if optim.max_steps is not None
        else max(1, round(optim.epochs * num_examples))
    )
    budget = chosen.search.budget_tokens or max(1, round(examples * per_example))
    report_every = chosen.search.report_every_tokens or max(1, math.ceil(budget / _REPORTS))
    spec = Spec(
        recipe=config.plain(recipe),
        directory=str(directory / "trials"),
        namespace=hall.namespace,
        benches=hall.names,
        metric=chosen.search.metric,
        is_lr_scaled=chosen.space.is_lr_scaled,
        report_every=report_every,
        budget=chosen.search.budget_tokens,
        tokens_per_example=per_example,
        base_loss=base.value if base and chosen.search.metric == "eval_loss" else hall.base_loss(),
        mode=chosen.search.mode,
        seats=hall.seats,
        guards=asdict(chosen.search.guards),
    )
    storage.write_file(directory / _SPEC, json.dumps(asdict(spec), indent=1).encode())
    return budget, spec


def _tune(
    chosen: Search,
    space: Space,
    stage: int,
    directory: Path,
    hall: AnyHall,
    spec: Spec,
    budget: int,
    fixed: dict[str, Any],
    recorder: Recorder,
) -> None:
    """One stage under Ray Tune, or what is left of it."""
    # Tune (2.60) misses the files of its own loggers, which a search does without.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    name = f"tune-{stage}"
    trainable = tune.with_resources(hall.trainable, dict(hall.trial_resources))
    where = directory / name
    settings = {"verbose": 0, "storage_path": str(directory), "name": name}
    with session.environment(_TUNE_ENVIRONMENT | loggers.environment(chosen.search)):
        callbacks = [recorder, *loggers.make(chosen.search, chosen.recipe.name, directory)]
        if tune.Tuner.can_restore(str(where)):
            tuner = tune.Tuner.restore(
                str(where), trainable=trainable, resume_unfinished=True, resume_errored=True
            )
            # The restored ones are those of a driver that is gone (private name, Ray 2.60).
            tuner._local_tuner._run_config.callbacks = callbacks  # pyright: ignore
        else:
            searcher, count = make_searcher(chosen.search, space, directory=directory, fixed=fixed)
            params: dict[str, Any] = {"spec": str(directory / _SPEC)}
            if chosen.search.scheduler in POPULATION:
                searcher, count = None, 1
                params |= population(chosen.search, space, fixed=fixed)
            scheduler = make_scheduler(
                chosen.search, space, budget=budget, report=spec.report_every
            )
            minutes = chosen.search.budget_minutes
            tuner = tune.Tuner(
                trainable,
                param_space=params,
                tune_config=TuneConfig(
                    metric=chosen.search.metric,
                    mode=mode_of(chosen.search.metric),
                    search_alg=searcher,
                    scheduler=decades.keep_decades(
                        scheduler,
                        space,
                        chosen.recipe,
                        mode=chosen.search.mode,
                        time_attr=TOKENS,
                        budget=budget,
                    ),
                    num_samples=count,
                    max_concurrent_trials=hall.seats,
                    reuse_actors=False,  # a trial that is gone leaves nothing behind
                    time_budget_s=minutes * 60 if minutes else None,
                ),
                run_config=RunConfig(
                    **settings,
                    callbacks=callbacks,
                    failure_config=FailureConfig(max_failures=_MAX_FAILURES),
                    # All are kept: they are notes, and one may still be wanted by another trial.
                    checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
                ),
            )
        with hall.hosting():
            tuner.fit()
        searcher, _ = make_searcher(chosen.search, space, directory=directory, fixed=fixed)
        if isinstance(searcher, OptunaSearcher):
            searcher.close()  # at a time limit Tune (2.60) does not tell it who was stopped


def _claim(directory: Path, chosen: Search, *, resume: bool) -> None:
    """Write config.json for a new search; compare with it for one that goes on."""
    path = directory / "config.json"
    plain = search_config.plain(chosen)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored.setdefault("objective", plain["objective"])  # of a version that had but one
        lines = [x for x in config.difference(stored, plain) if not x.startswith(_CHANGEABLE)]
        if lines:
            changes = "\n  ".join(lines)
            raise ConfigError(
                f"{directory} belongs to another search:\n  {changes}\n"
                "Undo the change, or give the search another name"
            )
        if not resume and (directory / "tune-0").exists():
            raise ConfigError(
                f"{directory} holds this search already; go on with it by --resume, or give the "
                "search another name"
            )
    elif resume:
        raise ConfigError(f"{directory} holds no search to resume; leave --resume out")
    elif (directory / "recipe.json").exists():
        raise ConfigError(f"{directory} is a training run; give the search another name")
    storage.write_file(path, json.dumps(plain, indent=1).encode())


def _keep_best(directory: Path, outcome: finals.Outcome) -> None:
    """best/, the winner's adapter, and best.yaml, which trains it again."""
    source = Path(outcome.recipe.storage) / outcome.recipe.name / "adapter"
    manifest = storage.verify(source)

    def write(target: Path) -> None:
        for name in manifest.files:
            shutil.copyfile(source / name, target / name)

    target = directory / records.BEST
    storage.commit(target, write, attempt="search", info=manifest.info, replace=True)
    again = replace(outcome.recipe, name=f"{directory.name}-best", storage=str(directory.parent))
    text = yaml.safe_dump(config.plain(again), sort_keys=False)
    storage.write_file(directory / "best.yaml", text.encode())


def _result(
    directory: Path,
    record: SearchRecord,
    outcome: finals.Outcome,
    hall: AnyHall,
    trials: Trials,
    started: float,
) -> dict[str, Any]:
    counts = Counter(trial.state for trial in record.trials)
    best = record.trial(outcome.winner.trial)
    return {
        "search_dir": str(directory),
        "best_trial": best.trial,
        "best_config": dict(best.params),
        "learning_rate": best.learning_rate,
        "best_metric": outcome.winner.value,
        "base_metric": record.base.value if record.base is not None else None,
        "trials": len(record.trials),
        "finished": counts["finished"],
        "stopped": counts["stopped"],
        "failed": counts["failed"],
        "mean_seats_filled": record.mean_seats_filled,
        "isolation": record.isolation,
        "real_tokens": trials.real_tokens,
        "wall_s": round(time.perf_counter() - started, 3),
        "peak_rss_bytes": hall.peak_rss_bytes() + worker.peak_rss_bytes(),
    }
